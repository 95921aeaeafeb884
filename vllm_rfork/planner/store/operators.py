"""Orders of operators about one seed: drain it, and lift its quarantine."""

from __future__ import annotations

from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.store.base import Event, Store
from vllm_rfork.planner.store.errors import LimitReached, UnknownSeed
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.grants import Grants
from vllm_rfork.planner.store.records import Drain, Seed

#: Drains that are kept at once. Each outlives its seed, in case that is dropped as stale and returns.
MAX_DRAINS = 10_000


class Operators:
    """Applies the orders of operators.

    A drain is kept apart from the seed: it lasts until it is undone, or until another epoch is announced at the seed's
    address. The drain of a seed without an epoch (older workers) ends when the seed is dropped.

    Args:
        store: its ``observe`` is used.
    """

    def __init__(self, fleet: FleetState, grants: Grants, store: Store) -> None:
        self._fleet = fleet
        self._grants = grants
        self._store = store

    def drain(self, key: str, address: SeedAddress, *, undo: bool) -> int:
        """Grant a seed to nobody, or with ``undo`` to everybody again; returns its leases.

        Raises:
            UnknownSeed: no such seed under this key.
            LimitReached: too many seeds are drained already.
        """
        fleet, seed = self._fleet, self._seed(key, address)
        if undo == seed.drained:
            if undo:
                fleet.drains.pop(seed.name)
            else:
                self._make_room()
                fleet.drains[seed.name] = Drain(seed.key, seed.epoch)
            seed.drained = not undo
            fleet.keys_to_recheck.add(key)
            self._store.observe(Event("seed_undrained" if undo else "seed_drained", key, seed.name))
            self._grants.serve_waiters(seed)
        return seed.leases

    def lift(self, key: str, address: SeedAddress) -> bool:
        """End the quarantine of a seed, and forget the failures before; returns whether it was quarantined.

        Raises:
            UnknownSeed: no such seed under this key.
        """
        fleet, seed = self._fleet, self._seed(key, address)
        was_quarantined = fleet.now < seed.quarantined_until
        seed.failed, seed.quarantines, seed.causes, seed.quarantined_until = (), 0, "", 0.0
        if was_quarantined:
            fleet.due.cancel(("quarantine", seed.name, ""))
            self._store.observe(Event("quarantine_lifted", key, seed.name))
            self._grants.end_quarantine(seed)
        return was_quarantined

    def seed_announced(self, seed: Seed) -> None:
        """Apply the drain of a seed that returned; forget it if this is another one at the same address."""
        drain = self._fleet.drains.get(seed.name)
        if drain is None:
            return
        if seed.epoch and (drain.key, drain.epoch) == (seed.key, seed.epoch):
            seed.drained = True
        else:
            del self._fleet.drains[seed.name]

    def _seed(self, key: str, address: SeedAddress) -> Seed:
        seed = self._fleet.seeds.get(str(address))
        if seed is None or seed.key != key:
            raise UnknownSeed(f"no seed {address} under this key")
        return seed

    def _make_room(self) -> None:
        drains = self._fleet.drains
        if len(drains) >= MAX_DRAINS:
            gone = next((name for name in drains if name not in self._fleet.seeds), None)
            if gone is None:
                raise LimitReached(f"{MAX_DRAINS} seeds are drained already")
            del drains[gone]
