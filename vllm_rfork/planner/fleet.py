"""The records of the in-memory store and their indexes: what is there, but not what to do about it.

``Shelf`` is everything known about one key. Its candidates lie in ranked sets by fingerprint and bucket, so that
the next seed for any receiver is the first of a few small look-ups. No clock and no decisions here.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar

from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.index import RankedSet
from vllm_rfork.planner.policy import Policy, buckets, score
from vllm_rfork.planner.records import Record
from vllm_rfork.planner.store import Ask, Granted, Missed, Totals

#: The pool of all seeds of a key, for receivers that state no fingerprint.
ANY = None


@dataclass(slots=True)
class Seed(Record):
    """One announced seed.

    Quarantined until ``aside_until``: ``failed`` are the receivers whose forks from it failed since the last fork that
    succeeded or the last quarantine, each with the cause; ``quarantines`` counts those since the last success, and
    ``causes`` are those of the last one. ``held_until`` is caution after a state loss.
    """

    #: what every heartbeat and every lease changes: a successor starts the deadlines anew and counts the leases
    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"seen_at", "stale_at", "turn", "leases", "standing", "presence", "absent", "absent_at", "given_up"}
    )

    key: str
    address: SeedAddress
    name: str
    fingerprint: str
    slots: int
    labels: Mapping[str, str]
    epoch: str
    first_seen: float
    seen_at: float
    turn: int
    nic: str
    buckets: tuple[str, ...]
    leases: int = 0
    draining: bool = False
    failed: tuple[tuple[str, str], ...] = ()
    quarantines: int = 0
    causes: str = ""
    aside_until: float = 0.0
    held_until: float = 0.0
    stale_at: float = 0.0
    #: the state that the seed was announced to before this one, if it says so
    earlier_state: str = ""
    #: it keeps a presence connection; without one it is absent
    attends: bool = False
    #: number of the presence request that is held for the seed; 0: none
    presence: int = 0
    #: the seed's process is gone, as far as the planner knows: since when
    absent: bool = False
    absent_at: float = 0.0
    #: waiting receivers do not count on the seed's return any more
    given_up: bool = False
    #: serving, draining, aside, absent: as the indexes have it
    standing: tuple[bool, bool, bool, bool] | None = None

    def is_serving(self, now: float) -> bool:
        """Will grant sooner or later, so that waiting for it makes sense."""
        return not self.draining and not self.given_up and now >= self.aside_until

    def is_open(self, now: float) -> bool:
        """Can take one more lease now."""
        granted = self.held_until <= now < self.stale_at and not self.absent
        return granted and self.is_serving(now) and self.leases < self.slots


@dataclass(slots=True)
class Lease(Record):
    """One lease; ``ticket`` while its waiting receiver has not fetched it. ``key`` is empty for an orphan.

    ``receiver`` is the peer's address, ``host`` its label: behind a proxy all receivers have one address.
    """

    #: a successor gives every lease its full TTL: a renewal changes nothing that it has to know
    VOLATILE: ClassVar[frozenset[str]] = frozenset({"expires_at"})

    user_id: str
    name: str
    key: str
    receiver: str
    granted_at: float
    expires_at: float
    ticket: str = ""
    #: of the seed when it was granted: what the lease was given for, should the seed go and come back
    fingerprint: str = ""
    epoch: str = ""
    host: str = ""

    @property
    def who(self) -> str:
        """The receiver as logs name it, and as failures are counted by."""
        return f"{self.receiver} (host={self.host})" if self.host else self.receiver


@dataclass(slots=True)
class Intent(Record):
    """One pending loader: a worker that loads ``key`` from storage and will be a seed."""

    key: str
    intent: str
    fingerprint: str
    ttl_s: float


@dataclass(slots=True)
class Waiter:
    """One receiver in a line; ``number`` is its place among all that ever waited."""

    ticket: str
    ask: Ask
    number: int
    since: float
    result: Granted | Missed | None = None


@dataclass(slots=True)
class Shelf:
    """Everything known about one key; ``pools`` and ``serving`` are by fingerprint (and under ``ANY``)."""

    key: str
    seeds: dict[str, Seed] = field(default_factory=dict)
    #: the names of all seeds by fingerprint, in the order of their announcement
    prints: dict[str, dict[str, None]] = field(default_factory=dict)
    pools: dict[tuple[str | None, str], RankedSet] = field(default_factory=dict)
    serving: dict[str | None, set[str]] = field(default_factory=dict)
    lines: dict[str, OrderedDict[str, Waiter]] = field(default_factory=dict)
    intents: dict[str, str] = field(default_factory=dict)
    intent_counts: Counter[str] = field(default_factory=Counter)
    draining: set[str] = field(default_factory=set)
    aside: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    #: the leases of these seeds, in the order of their grant
    leases: dict[str, Lease] = field(default_factory=dict)
    slots: int = 0

    def is_empty(self) -> bool:
        """Nothing here is worth remembering."""
        return not (self.seeds or self.lines or self.intents)

    # --- candidates ----------------------------------------------------------------------------------------------
    def add(self, seed: Seed) -> None:
        """Put ``seed`` here; :meth:`rank` makes it a candidate."""
        self.seeds[seed.name] = seed
        self.prints.setdefault(seed.fingerprint, {})[seed.name] = None
        self.slots += seed.slots

    def rank(self, seed: Seed, policy: Policy, nic_leases: int, now: float) -> None:
        """Put ``seed`` where its present state belongs in every index."""
        standing = (seed.is_serving(now), seed.draining, now < seed.aside_until, seed.absent)
        if seed.standing != standing:
            seed.standing = standing
            self._stand(seed, *standing)
        is_open = seed.is_open(now)
        weight = score(policy, leases=seed.leases, slots=seed.slots, nic_leases=nic_leases, turn=seed.turn)
        for print_ in (seed.fingerprint, ANY):
            for bucket in seed.buckets:
                pool = self.pools.get((print_, bucket))
                if is_open:
                    if pool is None:
                        pool = self.pools[print_, bucket] = RankedSet()
                    pool.put(seed.name, weight)
                elif pool is not None:
                    pool.discard(seed.name)

    def _stand(self, seed: Seed, serving: bool, draining: bool, aside: bool, absent: bool) -> None:
        for print_ in (seed.fingerprint, ANY):
            names = self.serving.setdefault(print_, set())
            (names.add if serving else names.discard)(seed.name)
        (self.draining.add if draining else self.draining.discard)(seed.name)
        (self.aside.add if aside else self.aside.discard)(seed.name)
        (self.absent.add if absent else self.absent.discard)(seed.name)

    def forget(self, seed: Seed) -> None:
        """Take ``seed`` out of every index."""
        seed.standing = None
        for print_ in (seed.fingerprint, ANY):
            self.serving.get(print_, set()).discard(seed.name)
            if not self.serving.get(print_):
                self.serving.pop(print_, None)
            for bucket in seed.buckets:
                pool = self.pools.get((print_, bucket))
                if pool is not None:
                    pool.discard(seed.name)
                    if not len(pool):  # labels come and go while others serve: keep none for seeds that are gone
                        del self.pools[print_, bucket]
        self.draining.discard(seed.name)
        self.aside.discard(seed.name)
        self.absent.discard(seed.name)
        self.slots -= seed.slots
        names = self.prints[seed.fingerprint]
        del names[seed.name]
        if not names:
            del self.prints[seed.fingerprint]
        del self.seeds[seed.name]

    def best(self, ask: Ask, policy: Policy) -> Seed | None:
        """The open seed that ``ask`` should have."""
        prints: tuple[str | None, ...] = (ask.fingerprint, "") if ask.fingerprint else (ANY,)
        for bucket in buckets(policy, ask.labels):
            pools = [pool for each in prints if (pool := self.pools.get((each, bucket))) is not None]
            found = [top for pool in pools if (top := pool.best(ask.exclude)) is not None]
            if found:
                return self.seeds[min(found)[1]]
        return None

    # --- the line ------------------------------------------------------------------------------------------------
    def line(self, fingerprint: str | None = ANY) -> Iterator[Waiter]:
        """Waiters in order: all, or those whom a seed with ``fingerprint`` suits. Do not change it meanwhile."""
        prints = {fingerprint, ""} if fingerprint else self.lines.keys()
        lines = [self.lines[each].values() for each in prints if each in self.lines]
        return iter(lines[0]) if len(lines) == 1 else heapq.merge(*lines, key=attrgetter("number"))

    def first_for(self, seed: Seed, count: int) -> list[Waiter]:
        """The longest waiting receivers that ``seed`` suits, at most ``count``, in one pass through the line."""
        if not self.lines:
            return []
        suited = (each for each in self.line(seed.fingerprint) if seed.name not in each.ask.exclude)
        return list(itertools.islice(suited, count))

    def queue(self, waiter: Waiter) -> None:
        """Add ``waiter`` at the end."""
        self.lines.setdefault(waiter.ask.fingerprint, OrderedDict())[waiter.ticket] = waiter

    def unqueue(self, waiter: Waiter) -> None:
        """Take ``waiter`` out wherever it stands."""
        line = self.lines[waiter.ask.fingerprint]
        del line[waiter.ticket]
        if not line:
            del self.lines[waiter.ask.fingerprint]

    def has_hope(self, ask: Ask) -> bool:
        """Somebody that ``ask`` may fork from is serving, or loads from storage."""
        # Asked for every waiting receiver when a seed goes: what is cheap comes first, whatever a receiver excludes.
        suits = self.intent_counts[ask.fingerprint] + self.intent_counts[""] if ask.fingerprint else len(self.intents)
        own = self.intents.get(ask.intent) if ask.intent else None
        if own is not None and (not ask.fingerprint or own in (ask.fingerprint, "")):
            suits -= 1
        if suits > 0:
            return True
        prints: tuple[str | None, ...] = (ask.fingerprint, "") if ask.fingerprint else (ANY,)
        serving = [names for each in prints if (names := self.serving.get(each))]
        return any(len(names) > len(ask.exclude) or not names <= ask.exclude for names in serving)

    # --- intents -------------------------------------------------------------------------------------------------
    def add_intent(self, intent: str, fingerprint: str) -> None:
        """Remember ``intent``."""
        self.drop_intent(intent)
        self.intents[intent] = fingerprint
        self.intent_counts[fingerprint] += 1

    def drop_intent(self, intent: str) -> bool:
        """Forget ``intent``; whether it was known."""
        fingerprint = self.intents.pop(intent, None)
        if fingerprint is None:
            return False
        self.intent_counts[fingerprint] -= 1
        if not self.intent_counts[fingerprint]:
            del self.intent_counts[fingerprint]
        return True

    def totals(self, now: float) -> Totals:
        """Counts; ``now`` on the clock of the waiters' ``since``."""
        oldest = next(self.line(), None)
        return Totals(
            seeds=len(self.seeds),
            draining=len(self.draining),
            aside=len(self.aside),
            absent=len(self.absent),
            slots=self.slots,
            leases=len(self.leases),
            waiting=sum(map(len, self.lines.values())),
            intents=len(self.intents),
            oldest_wait_s=now - oldest.since if oldest else 0.0,
        )
