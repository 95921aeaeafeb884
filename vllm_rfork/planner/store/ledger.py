"""The in-memory store's books: seeds, leases, lines and deadlines, kept consistent with each other.

Every method is a bookkeeping step; ``memory_store`` composes them into decisions and says when each is taken.
No clock here: ``now`` is set at the start of a decision and stays until its end.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections import Counter

from vllm_rfork.planner.policy import buckets, nic_of
from vllm_rfork.planner.store.base import Announcement, Ask, LimitReached, Rules
from vllm_rfork.planner.store.estimates import KeyTimes
from vllm_rfork.planner.store.fleet import Intent, Lease, Seed, Shelf, Waiter
from vllm_rfork.planner.store.indexes import Deadlines
from vllm_rfork.planner.store.records import Book, Journal

#: Fields of a seed that are not taken over from an earlier leader: :meth:`Ledger.add_seed` computes them.
_COMPUTED = frozenset({"slots", "nic", "buckets", "leases", "standing", "counted", "seen_at", "stale_at"}) | {
    # Presence is the leader's: its connections ended with it.
    *("presence", "absent", "absent_at", "given_up"),
}


class Ledger:
    """The books. ``due`` holds ``(kind, name, other)``; kinds are seed, lease, intent, blocked, waiter and presence.

    What a successor of this process needs is in a :class:`Book`, and ``journal`` notes what changes there.
    """

    def __init__(self, rules: Rules, now: float, journal: Journal | None = None) -> None:
        self.rules = rules
        self.now = now
        self.born_at = now
        self.state_id = secrets.token_hex(4)
        self.shelves: dict[str, Shelf] = {}
        self.seeds = Book("seed", Seed, journal)
        self.leases = Book("lease", Lease, journal)
        self.intents = Book("intent", Intent, journal)
        self.times = Book("times", KeyTimes, journal)
        #: the lease that each receiver's own ticket was given, by ticket and key
        self.lease_of: dict[tuple[str, str], str] = {}
        self.leases_of: dict[str, set[str]] = {}
        self.waiters: dict[str, Waiter] = {}
        self.due = Deadlines()
        #: keys that have lost a seed or an intent in this decision: somebody may wait for nothing now
        self.bereft: set[str] = set()
        #: keys that have lost a waiter: nothing may be known about them any more, and nobody else's hope hangs on it
        self.left: set[str] = set()
        self._serial = 0
        self._nic_leases: Counter[str] = Counter()
        self._nic_seeds: dict[str, set[str]] = {}

    def next_number(self) -> int:
        """A number larger than every earlier one."""
        self._serial += 1
        return self._serial

    def shelf(self, key: str) -> Shelf:
        """The key's shelf, new where there was none. Raises :class:`LimitReached`."""
        shelf = self.shelves.get(key)
        if shelf is None:
            if len(self.shelves) >= self.rules.max_keys:
                raise LimitReached(f"there are {len(self.shelves)} keys already")
            shelf = self.shelves[key] = Shelf(key)
        return shelf

    def has_room_for(self, key: str) -> bool:
        """A shelf for ``key`` is there or may be made."""
        return key in self.shelves or len(self.shelves) < self.rules.max_keys

    # --- seeds ---------------------------------------------------------------------------------------------------
    def add_seed(self, new: Announcement, name: str) -> Seed:
        """A seed heard of for the first time; its leases may be known before it is. Raises LimitReached."""
        if len(self.seeds) >= self.rules.max_seeds:
            raise LimitReached(f"there are {len(self.seeds)} seeds already")
        seed = Seed(
            key=new.key,
            address=new.seed,
            name=name,
            fingerprint=new.fingerprint,
            slots=self.slots(new),
            labels=new.labels,
            epoch=new.epoch,
            first_seen=self.now,
            seen_at=self.now,
            turn=self.next_number(),
            nic=nic_of(new.seed.host, new.labels),
            buckets=buckets(self.rules.policy, new.labels),
        )
        shelf = self.shelf(new.key)
        self.seeds[name] = seed
        shelf.add(seed)
        self._nic_seeds.setdefault(seed.nic, set()).add(name)
        for user_id in self.leases_of.get(name, ()):
            self.leases[user_id].key = seed.key
            self._count(seed, self.leases[user_id])
        return seed

    def update_seed(self, seed: Seed, new: Announcement) -> None:
        """What a heartbeat may change about a seed that stays the same."""
        shelf = self.shelves[seed.key]
        seed.epoch = new.epoch or seed.epoch
        if seed.labels != new.labels or seed.slots != self.slots(new):
            # The indexes and sums hang on these: leave them and come back.
            shelf.forget(seed)
            self._leave_nic(seed)
            seed.labels, seed.slots = new.labels, self.slots(new)
            seed.nic, seed.buckets = nic_of(seed.address.host, new.labels), buckets(self.rules.policy, new.labels)
            shelf.add(seed)
            self._nic_seeds.setdefault(seed.nic, set()).add(seed.name)
            self._nic_leases[seed.nic] += seed.leases

    def remove_seed(self, seed: Seed, *, keep_leases: bool = False) -> list[Lease]:
        """Forget ``seed`` with its leases, or without those that were fetched; returns those that went with it."""
        lost = []
        for user_id in list(self.leases_of.get(seed.name, ())):
            lease = self.leases[user_id]
            self._uncount(seed, lease)
            if lease.ticket or not keep_leases:
                self._unlink_lease(lease)
                self.forget_ticket(lease.ticket)
                lost.append(lease)
        self.shelves[seed.key].forget(seed)
        del self.seeds[seed.name]
        self._leave_nic(seed)
        for kind in ("seed", "blocked", "presence"):
            self.due.cancel((kind, seed.name, ""))
        self.bereft.add(seed.key)
        return lost

    def rank(self, seed: Seed) -> None:
        """Bring every index to the seed's present state."""
        if self.rules.policy.weigh == "nic":
            # Its network card is busier or freer now, and so is every other seed's behind it.
            self._rank_nic(seed.nic)
        else:
            self.shelves[seed.key].rank(seed, self.rules.policy, 0, self.now)

    def slots(self, new: Announcement) -> int:
        """How many leases the announced seed carries at once."""
        return min(self.rules.slots if new.slots is None else new.slots, self.rules.max_slots)

    def _rank_nic(self, nic: str) -> None:
        for name in self._nic_seeds.get(nic, ()):
            seed = self.seeds[name]
            self.shelves[seed.key].rank(seed, self.rules.policy, self._nic_leases[nic], self.now)

    def _leave_nic(self, seed: Seed) -> None:
        names = self._nic_seeds[seed.nic]
        names.discard(seed.name)
        self._nic_leases[seed.nic] -= seed.leases
        if not names:
            del self._nic_seeds[seed.nic], self._nic_leases[seed.nic]
        elif self.rules.policy.weigh == "nic":
            self._rank_nic(seed.nic)

    # --- leases --------------------------------------------------------------------------------------------------
    def add_lease(self, lease: Lease) -> None:
        """Enter ``lease``; its seed may be unknown as yet."""
        self.leases[lease.user_id] = lease
        if lease.question:
            self.lease_of[lease.question, lease.key] = lease.user_id
        self.leases_of.setdefault(lease.name, set()).add(lease.user_id)
        self.due.set(("lease", lease.user_id, ""), lease.expires_at)
        if lease.name in self.seeds:
            self._count(self.seeds[lease.name], lease)

    def put_off(self, lease: Lease) -> None:
        """Its full TTL again from now; a short one while its receiver has not confirmed that it has it."""
        lease.expires_at = self.now + (self.rules.lease_ttl_s if lease.confirmed else self.confirm_s)
        self.due.set(("lease", lease.user_id, ""), lease.expires_at)

    def remove_lease(self, lease: Lease) -> Seed | None:
        """Forget ``lease``; returns its seed, if that is known."""
        self._unlink_lease(lease)
        seed = self.seeds.get(lease.name)
        if seed is not None:
            self._uncount(seed, lease)
        return seed

    def _unlink_lease(self, lease: Lease) -> None:
        del self.leases[lease.user_id]
        if lease.question:
            del self.lease_of[lease.question, lease.key]
        self.due.cancel(("lease", lease.user_id, ""))
        siblings = self.leases_of[lease.name]
        siblings.discard(lease.user_id)
        if not siblings:
            del self.leases_of[lease.name]

    def _count(self, seed: Seed, lease: Lease) -> None:
        seed.leases += 1
        self.shelves[seed.key].leases[lease.user_id] = lease
        self._nic_leases[seed.nic] += 1

    def _uncount(self, seed: Seed, lease: Lease) -> None:
        seed.leases -= 1
        del self.shelves[seed.key].leases[lease.user_id]
        self._nic_leases[seed.nic] -= 1

    # --- waiters and intents -------------------------------------------------------------------------------------
    def add_waiter(self, ask: Ask, grace_s: float) -> Waiter:
        """``ask`` at the end of its line; forgotten ``grace_s`` after its wait is over, whatever happens."""
        waiter = Waiter(ask.ticket, ask, self.next_number(), self.now)
        self.shelf(ask.key).queue(waiter)
        self.waiters[waiter.ticket] = waiter
        self.due.set(("waiter", waiter.ticket, ""), self.now + ask.wait_s + grace_s)
        return waiter

    @property
    def confirm_s(self) -> float:
        """How long a lease by ticket waits for its first renewal, and a place in the queue for its receiver."""
        return min(self.rules.confirm_s, self.rules.lease_ttl_s)

    def times_of(self, key: str) -> KeyTimes:
        """The measured times of ``key``, to add to; they outlive its seeds, and the oldest make room for new ones."""
        times = self.times.get(key)
        if times is None:
            if len(self.times) >= self.rules.max_keys:
                del self.times[next(iter(self.times))]
            times = self.times[key] = KeyTimes()
        return times

    def forget_ticket(self, ticket: str) -> None:
        """Forget a waiter, settled or not; nothing where there is none."""
        waiter = self.waiters.pop(ticket, None)
        if waiter is None:
            return
        self.due.cancel(("waiter", ticket, ""))
        if waiter.result is None:
            self.shelves[waiter.ask.key].unqueue(waiter)
        self.left.add(waiter.ask.key)

    def add_intent(self, key: str, intent: str, fingerprint: str, ttl_s: float, since: float | None = None) -> bool:
        """Remember an intent, from now or ``since`` then, or put its end off; False where a limit forbids it."""
        since = self.now if since is None else since
        if ("intent", key, intent) in self.due:
            if self.shelves[key].intents[intent] == fingerprint:
                self.intents[_intent(key, intent)].ttl_s = ttl_s
                self.due.set(("intent", key, intent), self.now + ttl_s)
                return True
            self.drop_intent(key, intent)
        elif len(self.intents) >= self.rules.max_intents or not self.has_room_for(key):
            return False
        self.shelf(key).add_intent(intent, fingerprint, since)
        self.intents[_intent(key, intent)] = Intent(key, intent, fingerprint, ttl_s, since)
        self.due.set(("intent", key, intent), self.now + ttl_s)
        return True

    def drop_intent(self, key: str, intent: str) -> bool:
        """Forget an intent; whether it was known."""
        shelf = self.shelves.get(key)
        if not intent or shelf is None or not shelf.drop_intent(intent):
            return False
        del self.intents[_intent(key, intent)]
        self.due.cancel(("intent", key, intent))
        self.bereft.add(key)
        return True

    # --- what an earlier leader wrote ----------------------------------------------------------------------------
    def put_back_seed(self, kept: Seed) -> None:
        """A seed of an earlier leader, with its full time until it is stale. Raises LimitReached."""
        seed = self.add_seed(
            Announcement(
                key=kept.key,
                seed=kept.address,
                fingerprint=kept.fingerprint,
                slots=kept.slots,
                labels=kept.labels,
                epoch=kept.epoch,
            ),
            kept.name,
        )
        for field in dataclasses.fields(Seed):
            if field.name not in _COMPUTED:
                setattr(seed, field.name, getattr(kept, field.name))
        self._serial = max(self._serial, seed.turn)
        seed.stale_at = self.now + self.rules.stale_s
        self.due.set(("seed", seed.name, ""), seed.stale_at)
        if seed.attends:
            self.due.set(("presence", seed.name, ""), self.now + self.rules.presence_takeover_s)
        if (until := max(seed.aside_until, seed.held_until)) > self.now:
            self.due.set(("blocked", seed.name, ""), until)
        self.rank(seed)

    def put_back_lease(self, lease: Lease) -> None:
        """A lease of an earlier leader, with its full TTL.

        A lease whose receiver has not fetched it was never answered: only one that keeps its ticket may ask again.
        """
        lease.confirmed = not lease.ticket  # renewals are not written
        claim_s = self.confirm_s if lease.question else self.rules.claim_s
        lease.expires_at = self.now + (claim_s if lease.ticket else self.rules.lease_ttl_s)
        self.add_lease(lease)
        if lease.name in self.seeds:
            self.rank(self.seeds[lease.name])

    def put_back_intent(self, intent: Intent) -> None:
        """An intent of an earlier leader, with its full TTL."""
        self.add_intent(intent.key, intent.intent, intent.fingerprint, intent.ttl_s, intent.since)


def _intent(key: str, intent: str) -> str:
    """The name of an intent in its book: both texts are free, so no separator would do."""
    return json.dumps([key, intent])
