"""Leases of an earlier state, which a restart without state forgot: taken over if they can be verified."""

from __future__ import annotations

from vllm_rfork.planner.store.base import Event, Store
from vllm_rfork.planner.store.errors import UnknownLease
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.lease_ids import state_of
from vllm_rfork.planner.store.records import Lease, Seed


class EarlierLeases:
    """Notes renewals of forgotten leases, and adds the leases once they are proven.

    Args:
        store: its ``observe`` and ``lease_ids`` are used.
    """

    def __init__(self, fleet: FleetState, store: Store) -> None:
        self._fleet = fleet
        self._rules = fleet.rules
        self._store = store
        #: leases that were renewed before their seed reported the earlier state, by seed
        self._noted: dict[str, list[str]] = {}

    def may_be(self, user_id: str) -> bool:
        """Return whether an earlier state can have granted ``user_id``, and it can still be valid."""
        fleet = self._fleet
        young = fleet.now < fleet.born_at + max(self._rules.lease_ttl_s, self._rules.recovery_hold_s)
        if not young:
            self._noted.clear()
        return young and state_of(user_id) not in ("", fleet.state_id) and len(fleet.leases) < self._rules.max_seeds

    def renew(self, name: str, user_id: str) -> Lease | None:
        """Take over the lease on the seed ``name``; None: it is noted until the seed reports its earlier state.

        Raises:
            UnknownLease: it cannot be verified, or the seed has no slot for it.
        """
        if not self._store.lease_ids.provable and name not in self._fleet.seeds:
            self._note(name, user_id)
            return None
        lease = self._adopt(name, user_id)
        if lease is None:
            raise UnknownLease("no such lease")
        return lease

    def forget(self, name: str, user_id: str) -> None:
        """Forget a lease on the seed ``name`` that was noted, because its receiver released it."""
        if user_id in (noted := self._noted.get(name, [])):
            noted.remove(user_id)

    def seed_announced(self, seed: Seed, known_state: str) -> None:
        """Withhold the slots of a new ``seed`` while forgotten leases may use them, and take over the noted ones."""
        fleet, hold_s = self._fleet, self._rules.recovery_hold_s
        if known_state and known_state != fleet.state_id:
            # Until every lease of that state has expired or has been renewed here, the number of free slots is unknown.
            hold_s = max(hold_s, self._rules.lease_ttl_s)
            seed.earlier_state = known_state
            self._store.observe(Event("state_lost", seed.key, seed.name))
        if fleet.born_at + hold_s > fleet.now:
            seed.recovering_until = fleet.born_at + hold_s
            fleet.due.set(("quarantine", seed.name, ""), seed.recovering_until)
        for user_id in self._noted.pop(seed.name, ()):
            if self.may_be(user_id) and (lease := self._adopt(seed.name, user_id)) is not None:
                fleet.extend(lease)

    def _note(self, name: str, user_id: str) -> None:
        """Remember a lease that takes no slot yet."""
        noted = self._noted.get(name)
        if noted is None:
            if len(self._noted) >= self._rules.max_seeds:
                raise UnknownLease("no such lease")
            noted = self._noted[name] = []
        if user_id not in noted:
            if len(noted) >= self._rules.max_slots:
                raise UnknownLease("no such lease")
            noted.append(user_id)

    def _adopt(self, name: str, user_id: str) -> Lease | None:
        fleet = self._fleet
        seed = fleet.seeds.get(name)
        if self._store.lease_ids.provable:
            genuine = self._store.lease_ids.is_proven(user_id, name)
        else:
            genuine = seed is not None and state_of(user_id) == seed.earlier_state
        room = self._rules.max_slots if seed is None else seed.slots
        if not genuine or len(fleet.leases_of.get(name, ())) >= room:
            return None
        lease = Lease(user_id, name, seed.key if seed else "", "(earlier state)", fleet.now, fleet.now)
        fleet.add_lease(lease)
        if seed is not None:
            fleet.rank(seed)
        self._store.observe(Event("lease_adopted", lease.key, name))
        return lease
