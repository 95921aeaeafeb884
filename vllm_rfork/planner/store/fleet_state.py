"""The fleet in memory: seeds, leases, queues and deadlines, kept consistent with each other.

Each method is a bookkeeping step; the decisions are composed of them (``seed_lifecycle``, ``queue``, ``grants``).
There is no clock here: ``now`` is set at the start of a decision and stays until its end.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter

from vllm_rfork.planner.policy import buckets, nic_of
from vllm_rfork.planner.store.base import Announcement, Ask, Rules
from vllm_rfork.planner.store.errors import LimitReached
from vllm_rfork.planner.store.estimates import KeyTimes
from vllm_rfork.planner.store.indexes import Deadlines
from vllm_rfork.planner.store.journal import Book, Journal
from vllm_rfork.planner.store.key_state import KeyState
from vllm_rfork.planner.store.key_use import KeyUse
from vllm_rfork.planner.store.records import Drain, Intent, Lease, Seed, Waiter


class FleetState:
    """Everything that decisions read and change.

    What a successor of this process needs is in :class:`Book`; ``journal`` notes what changes there.

    Attributes:
        drains: the orders of operators to drain a seed, by the seed's name; it may be unknown.
        due: deadlines as ``(kind, name, other)``; kinds are lease, intent, quarantine, waiter and presence.
        stale: when each seed becomes stale.
        lease_of: the lease that was granted to a receiver's own ticket, by ticket and key.
        keys_to_recheck: keys that lost a seed or an intent in this decision; their waiters must be rechecked.
        keys_to_prune: keys that lost something in this decision and may be empty.
    """

    def __init__(self, rules: Rules, now: float, journal: Journal | None = None) -> None:
        self.rules = rules
        self.now = now
        self.born_at = now
        self.state_id = secrets.token_hex(4)
        self.keys: dict[str, KeyState] = {}
        self.seeds = Book("seed", Seed, journal)
        self.drains = Book("drain", Drain, journal)
        self.leases = Book("lease", Lease, journal)
        self.intents = Book("intent", Intent, journal)
        self.times = Book("times", KeyTimes, journal)
        self.use = Book("use", KeyUse, journal)
        self.lease_of: dict[tuple[str, str], str] = {}
        self.leases_of: dict[str, set[str]] = {}
        self.waiters: dict[str, Waiter] = {}
        self.due = Deadlines()
        self.stale = Deadlines()
        self.keys_to_recheck: set[str] = set()
        self.keys_to_prune: set[str] = set()
        self._serial = 0
        self._nic_leases: Counter[str] = Counter()
        self._nic_seeds: dict[str, set[str]] = {}

    def next_number(self) -> int:
        """Return a number larger than every earlier one."""
        self._serial += 1
        return self._serial

    def numbers_begin_after(self, number: int) -> None:
        """Make :meth:`next_number` return larger numbers than ``number``."""
        self._serial = max(self._serial, number)

    def key_state(self, key: str) -> KeyState:
        """Return the state of ``key``, which is created if needed. Raises :class:`LimitReached`."""
        found = self.keys.get(key)
        if found is None:
            if len(self.keys) >= self.rules.max_keys:
                raise LimitReached(f"there are {len(self.keys)} keys already")
            found = self.keys[key] = KeyState(key)
        return found

    def has_room_for(self, key: str) -> bool:
        """Return whether ``key`` is known or may be added."""
        return key in self.keys or len(self.keys) < self.rules.max_keys

    # --- seeds ---------------------------------------------------------------------------------------------------
    def add_seed(self, new: Announcement, name: str) -> Seed:
        """Add a seed; its leases may be known already. Raises :class:`LimitReached`."""
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
            parent=new.parent,
            differs=new.differs,
            first_seen=self.now,
            seen_at=self.now,
            turn=self.next_number(),
            nic=nic_of(new.seed.host, new.labels),
            buckets=buckets(self.rules.policy, new.labels),
        )
        key_state = self.key_state(new.key)
        self.seeds[name] = seed
        key_state.add(seed)
        self._nic_seeds.setdefault(seed.nic, set()).add(name)
        for user_id in self.leases_of.get(name, ()):
            self.leases[user_id].key = seed.key
            self._count(seed, self.leases[user_id])
        return seed

    def update_seed(self, seed: Seed, new: Announcement) -> None:
        """Apply a heartbeat to a seed that is still the same."""
        key_state = self.keys[seed.key]
        seed.epoch, seed.parent, seed.differs = new.epoch or seed.epoch, new.parent or seed.parent, new.differs
        if seed.labels != new.labels or seed.slots != self.slots(new):
            # Indexes and sums depend on these: remove the seed and add it again.
            key_state.remove(seed)
            self._leave_nic(seed)
            seed.labels, seed.slots = new.labels, self.slots(new)
            seed.nic, seed.buckets = nic_of(seed.address.host, new.labels), buckets(self.rules.policy, new.labels)
            key_state.add(seed)
            self._nic_seeds.setdefault(seed.nic, set()).add(seed.name)
            self._nic_leases[seed.nic] += seed.leases

    def remove_seed(self, seed: Seed, *, keep_leases: bool = False) -> list[Lease]:
        """Remove ``seed`` and return the leases that went with it: all, or with ``keep_leases`` the unfetched ones."""
        lost = []
        for user_id in list(self.leases_of.get(seed.name, ())):
            lease = self.leases[user_id]
            self._uncount(seed, lease)
            if lease.unfetched_ticket or not keep_leases:
                self._unlink_lease(lease)
                self.forget_ticket(lease.unfetched_ticket)
                lost.append(lease)
        self.keys[seed.key].remove(seed)
        del self.seeds[seed.name]
        self._leave_nic(seed)
        self.stale.cancel(("seed", seed.name, ""))
        for kind in ("quarantine", "presence"):
            self.due.cancel((kind, seed.name, ""))
        self.keys_to_recheck.add(seed.key)
        return lost

    def set_stale_at(self, seed: Seed, at: float) -> None:
        """Let ``seed`` become stale at ``at``."""
        seed.stale_at = at
        self.stale.set(("seed", seed.name, ""), at)

    def rank(self, seed: Seed) -> None:
        """Update every index to the present state of ``seed``."""
        if self.rules.policy.weigh == "nic":
            # Its network card is busier or freer now, which concerns every seed behind that card.
            self._rank_nic(seed.nic)
        else:
            self.keys[seed.key].rank(seed, self.rules.policy, 0, self.now)

    def slots(self, new: Announcement) -> int:
        """Return how many leases the announced seed carries at once."""
        return min(self.rules.slots if new.slots is None else new.slots, self.rules.max_slots)

    def _rank_nic(self, nic: str) -> None:
        for name in self._nic_seeds.get(nic, ()):
            seed = self.seeds[name]
            self.keys[seed.key].rank(seed, self.rules.policy, self._nic_leases[nic], self.now)

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
        """Add ``lease``; its seed may still be unknown."""
        self.leases[lease.user_id] = lease
        if lease.ticket:
            self.lease_of[lease.ticket, lease.key] = lease.user_id
        self.leases_of.setdefault(lease.name, set()).add(lease.user_id)
        self.due.set(("lease", lease.user_id, ""), lease.expires_at)
        if lease.name in self.seeds:
            self._count(self.seeds[lease.name], lease)

    def extend(self, lease: Lease) -> None:
        """Give ``lease`` its full TTL from now, or a short one until its receiver confirms it."""
        lease.expires_at = self.now + (self.rules.lease_ttl_s if lease.confirmed else self.rules.confirmation_s)
        self.due.set(("lease", lease.user_id, ""), lease.expires_at)

    def remove_lease(self, lease: Lease) -> Seed | None:
        """Remove ``lease``; returns its seed, if that is known."""
        self._unlink_lease(lease)
        seed = self.seeds.get(lease.name)
        if seed is not None:
            self._uncount(seed, lease)
        return seed

    def _unlink_lease(self, lease: Lease) -> None:
        del self.leases[lease.user_id]
        if lease.ticket:
            del self.lease_of[lease.ticket, lease.key]
        self.due.cancel(("lease", lease.user_id, ""))
        siblings = self.leases_of[lease.name]
        siblings.discard(lease.user_id)
        if not siblings:
            del self.leases_of[lease.name]

    def _count(self, seed: Seed, lease: Lease) -> None:
        seed.leases += 1
        self.keys[seed.key].leases[lease.user_id] = lease
        self._nic_leases[seed.nic] += 1

    def _uncount(self, seed: Seed, lease: Lease) -> None:
        seed.leases -= 1
        del self.keys[seed.key].leases[lease.user_id]
        self._nic_leases[seed.nic] -= 1

    # --- waiters and intents -------------------------------------------------------------------------------------
    def add_waiter(self, ask: Ask, grace_s: float) -> Waiter:
        """Put ``ask`` at the end of its queue; it is forgotten ``grace_s`` after its wait, whatever happens."""
        waiter = Waiter(ask.ticket, ask, self.next_number(), self.now)
        self.key_state(ask.key).enqueue(waiter)
        self.waiters[waiter.ticket] = waiter
        self.due.set(("waiter", waiter.ticket, ""), self.now + ask.wait_s + grace_s)
        return waiter

    def forget_ticket(self, ticket: str) -> None:
        """Forget a waiter, settled or not, if it is known."""
        waiter = self.waiters.pop(ticket, None)
        if waiter is None:
            return
        self.due.cancel(("waiter", ticket, ""))
        if waiter.result is None:
            self.keys[waiter.ask.key].dequeue(waiter)
        self.keys_to_prune.add(waiter.ask.key)

    def add_intent(self, new: Intent) -> bool:
        """Record an intent, or renew it; False if a limit forbids it."""
        key, intent = new.key, new.intent
        if ("intent", key, intent) in self.due:
            if self.keys[key].intents[intent] == new.fingerprint:
                self.intents[_intent(key, intent)].ttl_s = new.ttl_s
                self.due.set(("intent", key, intent), self.now + new.ttl_s)
                return True
            self.drop_intent(key, intent)
        elif len(self.intents) >= self.rules.max_intents or not self.has_room_for(key):
            return False
        self.key_state(key).add_intent(intent, new.fingerprint, new.since)
        self.intents[_intent(key, intent)] = new
        self.due.set(("intent", key, intent), self.now + new.ttl_s)
        return True

    def has_intent(self, key: str, intent: str) -> bool:
        """Return whether a pending loader is known."""
        return _intent(key, intent) in self.intents

    def intent(self, key: str, intent: str) -> Intent:
        """Return the record of a pending loader, which must be known."""
        return self.intents[_intent(key, intent)]

    def drop_intent(self, key: str, intent: str) -> None:
        """Forget an intent, if it is known."""
        key_state = self.keys.get(key)
        if intent and key_state is not None and key_state.drop_intent(intent):
            del self.intents[_intent(key, intent)]
            self.due.cancel(("intent", key, intent))
            self.keys_to_recheck.add(key)


def _intent(key: str, intent: str) -> str:
    """Return the name of an intent in its book: both texts are free, so that no separator would do."""
    return json.dumps([key, intent])
