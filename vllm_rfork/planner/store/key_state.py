"""Everything known about one seed key, with indexes: the next seed for a receiver is the first of a few look-ups."""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from vllm_rfork.planner.policy import Policy, buckets, score
from vllm_rfork.planner.store.base import Ask, Totals
from vllm_rfork.planner.store.indexes import RankedSet
from vllm_rfork.planner.store.records import Lease, Seed, Waiter

#: In place of a fingerprint: all seeds of the key, for receivers that send none.
ANY = None


def _suitable(ask: Ask) -> tuple[str | None, ...]:
    """The fingerprints of seeds that ``ask`` may be paired with."""
    return (ask.fingerprint, "") if ask.fingerprint else (ANY,)


@dataclass(slots=True)
class KeyState:
    """Seeds, leases, intents and the queue of one key.

    Attributes:
        by_fingerprint: names of all seeds, in the order of their announcement.
        pools: seeds that can be granted now, ranked, by fingerprint (and ``ANY``) and policy bucket.
        serving: names of seeds that serve, by fingerprint (and ``ANY``).
        queues: waiting receivers by fingerprint and ticket, first come first.
        numbers: the numbers of each queue, ascending.
        intents: fingerprints of pending loaders by their ids; ``intent_since`` is when each began.
        leases: of these seeds, in the order of their grant.
        ready, ready_seeds: slots of serving seeds that may be granted, and those seeds, by fingerprint (and ``ANY``).
        withheld: slots that may be granted from ``withheld_until`` on.
    """

    key: str
    seeds: dict[str, Seed] = field(default_factory=dict)
    by_fingerprint: dict[str, dict[str, None]] = field(default_factory=dict)
    pools: dict[tuple[str | None, str], RankedSet] = field(default_factory=dict)
    serving: dict[str | None, set[str]] = field(default_factory=dict)
    queues: dict[str, OrderedDict[str, Waiter]] = field(default_factory=dict)
    numbers: dict[str, list[int]] = field(default_factory=dict)
    intents: dict[str, str] = field(default_factory=dict)
    intent_since: dict[str, float] = field(default_factory=dict)
    intent_counts: Counter[str] = field(default_factory=Counter)
    draining: set[str] = field(default_factory=set)
    quarantined: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    leases: dict[str, Lease] = field(default_factory=dict)
    slots: int = 0
    ready: Counter[str | None] = field(default_factory=Counter)
    ready_seeds: Counter[str | None] = field(default_factory=Counter)
    withheld: Counter[str | None] = field(default_factory=Counter)
    withheld_until: float = 0.0

    def is_empty(self) -> bool:
        """Return whether nothing here is worth keeping."""
        return not (self.seeds or self.queues or self.intents)

    # --- seeds ---------------------------------------------------------------------------------------------------
    def add(self, seed: Seed) -> None:
        """Add ``seed``; :meth:`rank` makes it a candidate."""
        self.seeds[seed.name] = seed
        self.by_fingerprint.setdefault(seed.fingerprint, {})[seed.name] = None
        self.slots += seed.slots

    def rank(self, seed: Seed, policy: Policy, nic_leases: int, now: float) -> None:
        """Update every index to the present state of ``seed``."""
        standing = (seed.is_serving(now), seed.is_draining, now < seed.quarantined_until, seed.absent)
        if seed.standing != standing:
            seed.standing = standing
            self._stand(seed, *standing)
        is_withheld = now < seed.recovering_until
        if is_withheld:
            self.withheld_until = seed.recovering_until
        serving_slots = seed.slots if standing[0] and not seed.absent else 0
        self._count_slots(seed, (0, serving_slots) if is_withheld else (serving_slots, 0))
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

    def _stand(self, seed: Seed, serving: bool, draining: bool, quarantined: bool, absent: bool) -> None:
        sets = [(self.serving.setdefault(each, set()), serving) for each in (seed.fingerprint, ANY)]
        sets += [(self.draining, draining), (self.quarantined, quarantined), (self.absent, absent)]
        for names, belongs in sets:
            (names.add if belongs else names.discard)(seed.name)

    def _count_slots(self, seed: Seed, counted: tuple[int, int]) -> None:
        """Count the grantable and the withheld slots of ``seed``."""
        if counted == seed.counted:
            return
        before, seed.counted = seed.counted, counted
        for print_ in (seed.fingerprint, ANY):
            self.ready[print_] += counted[0] - before[0]
            self.ready_seeds[print_] += (counted[0] > 0) - (before[0] > 0)
            self.withheld[print_] += counted[1] - before[1]
            for counter in (self.ready, self.ready_seeds, self.withheld):
                if not counter[print_]:
                    del counter[print_]

    def remove(self, seed: Seed) -> None:
        """Remove ``seed`` from every index."""
        self._stand(seed, serving=False, draining=False, quarantined=False, absent=False)
        seed.standing = None
        self._count_slots(seed, (0, 0))
        for print_ in (seed.fingerprint, ANY):
            if not self.serving[print_]:
                del self.serving[print_]
            for bucket in seed.buckets:
                pool = self.pools.get((print_, bucket))
                if pool is not None:
                    pool.discard(seed.name)
                    if not len(pool):  # labels come and go while others serve: keep none for seeds that are gone
                        del self.pools[print_, bucket]
        self.slots -= seed.slots
        names = self.by_fingerprint[seed.fingerprint]
        del names[seed.name]
        if not names:
            del self.by_fingerprint[seed.fingerprint]
        del self.seeds[seed.name]

    def best(self, ask: Ask, policy: Policy) -> Seed | None:
        """Return the open seed that ``ask`` should get."""
        prints = _suitable(ask)
        for bucket in buckets(policy, ask.labels):
            pools = [pool for each in prints if (pool := self.pools.get((each, bucket))) is not None]
            found = [top for pool in pools if (top := pool.best(ask.exclude)) is not None]
            if found:
                return self.seeds[min(found)[1]]
        return None

    def slots_for(self, ask: Ask) -> tuple[int, int, int]:
        """Count what suits ``ask``: grantable slots, the seeds that carry them, and withheld slots."""
        prints = _suitable(ask)
        ready, seeds, withheld = (
            sum(counter[each] for each in prints) for counter in (self.ready, self.ready_seeds, self.withheld)
        )
        for name in ask.exclude:
            seed = self.seeds.get(name)
            if seed is not None and (prints == (ANY,) or seed.fingerprint in prints):
                ready -= seed.counted[0]
                seeds -= seed.counted[0] > 0
                withheld -= seed.counted[1]
        return ready, seeds, withheld

    # --- the queue -----------------------------------------------------------------------------------------------
    def waiters(self, fingerprint: str | None = ANY) -> Iterator[Waiter]:
        """Waiters in order: all, or those that may use a seed with ``fingerprint``. Do not change it meanwhile."""
        prints = {fingerprint, ""} if fingerprint else self.queues.keys()
        queues = [self.queues[each].values() for each in prints if each in self.queues]
        return iter(queues[0]) if len(queues) == 1 else heapq.merge(*queues, key=attrgetter("number"))

    def first_for(self, seed: Seed, count: int) -> list[Waiter]:
        """Return the ``count`` longest waiting receivers that may use ``seed``, in one pass through the queue."""
        if not self.queues:
            return []
        waiters = self.waiters(seed.fingerprint)
        suited = (each for each in waiters if each.attached and seed.name not in each.ask.exclude)
        return list(itertools.islice(suited, count))

    def enqueue(self, waiter: Waiter) -> None:
        """Add ``waiter`` at the end."""
        self.queues.setdefault(waiter.ask.fingerprint, OrderedDict())[waiter.ticket] = waiter
        self.numbers.setdefault(waiter.ask.fingerprint, []).append(waiter.number)

    def dequeue(self, waiter: Waiter) -> None:
        """Remove ``waiter`` from its place."""
        queue, numbers = self.queues[waiter.ask.fingerprint], self.numbers[waiter.ask.fingerprint]
        del queue[waiter.ticket], numbers[bisect_left(numbers, waiter.number)]
        if not queue:
            del self.queues[waiter.ask.fingerprint], self.numbers[waiter.ask.fingerprint]

    def position(self, ask: Ask, number: float = float("inf")) -> int:
        """Return the place, from 1, of the waiter with ``number`` (or a new one) among those with suitable seeds."""
        prints = (ask.fingerprint, "") if ask.fingerprint else tuple(self.numbers)
        return 1 + sum(bisect_left(self.numbers[each], number) for each in prints if each in self.numbers)

    def has_hope(self, ask: Ask) -> bool:
        """Return whether a suitable seed is serving or a suitable worker loads from storage."""
        # Called for every waiting receiver when a seed goes: the cheap check comes first.
        suits = self.intent_counts[ask.fingerprint] + self.intent_counts[""] if ask.fingerprint else len(self.intents)
        own = self.intents.get(ask.intent) if ask.intent else None
        if own is not None and (not ask.fingerprint or own in (ask.fingerprint, "")):
            suits -= 1
        if suits > 0:
            return True
        serving = [names for each in _suitable(ask) if (names := self.serving.get(each))]
        return any(len(names) > len(ask.exclude) or not names <= ask.exclude for names in serving)

    # --- intents -------------------------------------------------------------------------------------------------
    def add_intent(self, intent: str, fingerprint: str, since: float) -> None:
        """Add ``intent``, or replace it."""
        self.drop_intent(intent)
        self.intents[intent] = fingerprint
        self.intent_since[intent] = since
        self.intent_counts[fingerprint] += 1

    def drop_intent(self, intent: str) -> bool:
        """Forget ``intent``; False if it was unknown."""
        fingerprint = self.intents.pop(intent, None)
        if fingerprint is None:
            return False
        del self.intent_since[intent]
        self.intent_counts[fingerprint] -= 1
        if not self.intent_counts[fingerprint]:
            del self.intent_counts[fingerprint]
        return True

    def oldest_load(self, ask: Ask) -> float | None:
        """Return when the oldest pending loader that suits ``ask`` began; None if there is none."""
        for intent, print_ in self.intents.items():
            if intent != ask.intent and (not ask.fingerprint or print_ in (ask.fingerprint, "")):
                return self.intent_since[intent]
        return None

    def totals(self, now: float) -> Totals:
        """Count everything; ``now`` on the clock of the waiters' ``since``."""
        oldest = next(self.waiters(), None)
        return Totals(
            seeds=len(self.seeds),
            draining=len(self.draining),
            aside=len(self.quarantined),
            absent=len(self.absent),
            slots=self.slots,
            leases=len(self.leases),
            waiting=sum(map(len, self.queues.values())),
            intents=len(self.intents),
            oldest_wait_s=now - oldest.since if oldest else 0.0,
        )
