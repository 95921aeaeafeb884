"""The records of the in-memory store and their indexes: what is there, but not what to do about it.

``Shelf`` is everything known about one key. Its candidates lie in ranked sets by fingerprint and bucket, so that
the next seed for any receiver is the first of a few small look-ups. No clock and no decisions here.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import ClassVar

from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.policy import Policy, buckets, score
from vllm_rfork.planner.store.base import Ask, Granted, Missed, Totals
from vllm_rfork.planner.store.indexes import RankedSet
from vllm_rfork.planner.store.records import Record

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
        {"seen_at", "stale_at", "turn", "leases", "standing", "counted", "presence", "absent", "absent_at", "given_up"}
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
    #: slots that may be granted now, and slots that are held back, as the shelf counts them
    counted: tuple[int, int] = (0, 0)

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
    ``question`` is the receiver's own ticket, and until the lease is ``confirmed`` it lives for a short time only.
    """

    #: a successor gives every lease its full TTL: a renewal changes nothing that it has to know
    VOLATILE: ClassVar[frozenset[str]] = frozenset({"expires_at", "confirmed"})

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
    question: str = ""
    confirmed: bool = True

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
    since: float = 0.0


@dataclass(slots=True)
class Waiter:
    """One receiver in a line; ``number`` is its place among all that ever waited.

    One that is not ``attached`` has no question open at present and is not served.
    """

    ticket: str
    ask: Ask
    number: int
    since: float
    result: Granted | Missed | None = None
    attached: bool = True
    #: the longest wait in all, as it was last judged
    bound_s: float = 0.0


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
    #: the numbers of each line, ascending, for the place of a waiter
    numbers: dict[str, list[int]] = field(default_factory=dict)
    intents: dict[str, str] = field(default_factory=dict)
    #: when each intent was stated
    since: dict[str, float] = field(default_factory=dict)
    intent_counts: Counter[str] = field(default_factory=Counter)
    draining: set[str] = field(default_factory=set)
    aside: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    #: the leases of these seeds, in the order of their grant
    leases: dict[str, Lease] = field(default_factory=dict)
    slots: int = 0
    #: of seeds that serve, by fingerprint (and under ``ANY``): slots that may be granted, the seeds that carry them,
    #: and slots that are held back until ``held_until``
    ready: Counter[str | None] = field(default_factory=Counter)
    ready_seeds: Counter[str | None] = field(default_factory=Counter)
    held: Counter[str | None] = field(default_factory=Counter)
    held_until: float = 0.0

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
        is_held = now < seed.held_until
        if is_held:
            self.held_until = seed.held_until
        serving_slots = seed.slots if standing[0] and not seed.absent else 0
        self._count_slots(seed, (0, serving_slots) if is_held else (serving_slots, 0))
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

    def _count_slots(self, seed: Seed, counted: tuple[int, int]) -> None:
        """Count ``seed``'s slots as ready and as held."""
        if counted == seed.counted:
            return
        before, seed.counted = seed.counted, counted
        for print_ in (seed.fingerprint, ANY):
            self.ready[print_] += counted[0] - before[0]
            self.ready_seeds[print_] += (counted[0] > 0) - (before[0] > 0)
            self.held[print_] += counted[1] - before[1]
            for counter in (self.ready, self.ready_seeds, self.held):
                if not counter[print_]:
                    del counter[print_]

    def forget(self, seed: Seed) -> None:
        """Take ``seed`` out of every index."""
        seed.standing = None
        self._count_slots(seed, (0, 0))
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
        line = self.line(seed.fingerprint)
        suited = (each for each in line if each.attached and seed.name not in each.ask.exclude)
        return list(itertools.islice(suited, count))

    def queue(self, waiter: Waiter) -> None:
        """Add ``waiter`` at the end."""
        self.lines.setdefault(waiter.ask.fingerprint, OrderedDict())[waiter.ticket] = waiter
        self.numbers.setdefault(waiter.ask.fingerprint, []).append(waiter.number)

    def unqueue(self, waiter: Waiter) -> None:
        """Take ``waiter`` out wherever it stands."""
        line, numbers = self.lines[waiter.ask.fingerprint], self.numbers[waiter.ask.fingerprint]
        del line[waiter.ticket], numbers[bisect_left(numbers, waiter.number)]
        if not line:
            del self.lines[waiter.ask.fingerprint], self.numbers[waiter.ask.fingerprint]

    def position(self, ask: Ask, number: float = float("inf")) -> int:
        """The place of the waiter with ``number``, or of a new one, among those whom the same seeds suit; from 1."""
        prints = (ask.fingerprint, "") if ask.fingerprint else tuple(self.numbers)
        return 1 + sum(bisect_left(self.numbers[each], number) for each in prints if each in self.numbers)

    def slots_for(self, ask: Ask) -> tuple[int, int, int]:
        """Slots that may be granted, the seeds that carry them, and slots that are held back; of those that suit."""
        prints: tuple[str | None, ...] = (ask.fingerprint, "") if ask.fingerprint else (ANY,)
        ready, seeds, held = (
            sum(counter[each] for each in prints) for counter in (self.ready, self.ready_seeds, self.held)
        )
        for name in ask.exclude:
            seed = self.seeds.get(name)
            if seed is not None and (prints == (ANY,) or seed.fingerprint in prints):
                ready, seeds, held = ready - seed.counted[0], seeds - (seed.counted[0] > 0), held - seed.counted[1]
        return ready, seeds, held

    def oldest_loader(self, ask: Ask) -> float | None:
        """When the first of the pending loaders that suit stated its intent; None: there is none."""
        for intent, print_ in self.intents.items():
            if intent != ask.intent and (not ask.fingerprint or print_ in (ask.fingerprint, "")):
                return self.since[intent]
        return None

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
    def add_intent(self, intent: str, fingerprint: str, since: float) -> None:
        """Remember ``intent``."""
        self.drop_intent(intent)
        self.intents[intent] = fingerprint
        self.since[intent] = since
        self.intent_counts[fingerprint] += 1

    def drop_intent(self, intent: str) -> bool:
        """Forget ``intent``; whether it was known."""
        fingerprint = self.intents.pop(intent, None)
        if fingerprint is None:
            return False
        del self.since[intent]
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
