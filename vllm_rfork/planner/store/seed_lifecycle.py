"""The life of a seed in the planner: announced, present, absent, draining, withdrawn."""

from __future__ import annotations

import itertools

from vllm_rfork.logs.quoting import counted
from vllm_rfork.messages import SeedAddress
from vllm_rfork.messages.metering import Served
from vllm_rfork.planner.store.base import Announcement, Event, Store
from vllm_rfork.planner.store.earlier_leases import EarlierLeases
from vllm_rfork.planner.store.errors import StillLeased, UnknownSeed
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.grants import Grants
from vllm_rfork.planner.store.kept_keys import name_key, times_of
from vllm_rfork.planner.store.key_state import ANY
from vllm_rfork.planner.store.misses import EXAMINED
from vllm_rfork.planner.store.operators import Operators
from vllm_rfork.planner.store.records import Lease, Seed


class SeedLifecycle:
    """Decides about seeds: heartbeats, presence connections, withdrawals.

    Args:
        store: its ``observe`` is used.
    """

    def __init__(
        self, fleet: FleetState, grants: Grants, earlier: EarlierLeases, operators: Operators, store: Store
    ) -> None:
        self._fleet = fleet
        self._operators = operators
        self._rules = fleet.rules
        self._grants = grants
        self._earlier = earlier
        self._store = store
        #: the last seeds whose caches were counted, each with its load's intent; the oldest first
        self._reported: dict[tuple[str, str], None] = {}

    def announce(self, announcement: Announcement) -> tuple[str, Served]:
        """Add a seed or apply its heartbeat; returns the state id, and what it served. Raises :class:`LimitReached`."""
        fleet = self._fleet
        name = str(announcement.seed)
        seed = fleet.seeds.get(name)
        if seed is not None and (difference := _difference(seed, announcement)):
            self._grants.drop_seed(seed, difference)
            seed = None
        if seed is None:
            self._drop_leases_of_other_weights(announcement)
            seed = fleet.add_seed(announcement, name)
            self._earlier.seed_announced(seed, announcement.known_state)
            self._operators.seed_announced(seed)
            self._store.observe(Event("seed_added", seed.key, name))
        else:
            fleet.update_seed(seed, announcement)
        self._seen(seed)
        name_key(fleet, seed.key, announcement.names, by_seed=True)
        # A heartbeat soon after the connection broke may be one that the process had sent before it died.
        if seed.absent and fleet.now >= seed.absent_at + self._rules.return_s:
            self._returned(seed)
        self._fulfil(seed.key, announcement.intent)
        self._report_caches(seed, announcement)
        self._grants.serve_waiters(seed)
        return fleet.state_id, seed.served

    def _drop_leases_of_other_weights(self, announcement: Announcement) -> None:
        """Drop the leases that a stale seed left, if another one comes back at its address."""
        fleet, name = self._fleet, str(announcement.seed)
        for user_id in list(fleet.leases_of.get(name, ())):
            lease = fleet.leases[user_id]
            if lease.key and _difference(lease, announcement):
                self._grants.drop_lease(lease)
                self._store.observe(Event("lease_dropped", lease.key, name))

    def _fulfil(self, key: str, intent: str) -> None:
        """End the intent of a pending loader that became a seed, and measure how long its load took."""
        fleet = self._fleet
        since = fleet.keys[key].intent_since.get(intent)
        if since is not None:
            times_of(fleet, key).add_load(fleet.now - since)
        fleet.drop_intent(key, intent)

    def _report_caches(self, seed: Seed, announcement: Announcement) -> None:
        """Count the report on a start once: heartbeats repeat it, also those of a seed that was dropped meanwhile.

        A seed that returns after a sleep sends no intent.
        """
        report, intent = announcement.caches, announcement.intent
        if report is None or seed.caches is not None or not intent:
            return
        seed.caches = report
        if (seed.name, intent) in self._reported:
            return
        self._reported[seed.name, intent] = None
        if len(self._reported) > self._rules.max_intents:
            del self._reported[next(iter(self._reported))]
        self._grants.history.add_caches(intent, report)
        self._store.observe(Event("caches_reported", seed.key, seed.name, facts=vars(report)))

    def find(self, key: str) -> SeedAddress | None:
        """Return one serving seed of ``key``, another one each time."""
        fleet = self._fleet
        key_state = fleet.keys.get(key)
        if key_state is None:
            return None
        seeds = [key_state.seeds[name] for name in itertools.islice(key_state.serving.get(ANY, ()), EXAMINED)]
        found = [each.address for each in seeds if not each.absent and each.stale_at > fleet.now]
        return found[fleet.next_number() % len(found)] if found else None

    def _seen(self, seed: Seed) -> None:
        seed.seen_at = self._fleet.now
        self._fleet.set_stale_at(seed, self._fleet.now + self._rules.stale_s)

    def withdraw(self, key: str, address: SeedAddress) -> None:
        """Remove a seed. Raises :class:`UnknownSeed` or :class:`StillLeased`, and then it drains."""
        seed = self._fleet.seeds.get(str(address))
        if seed is None or seed.key != key:
            raise UnknownSeed(f"no seed {address} under this key")
        if not seed.leases:
            self._grants.drop_seed(seed, "withdrawn")
            return
        seed.draining = True
        self._fleet.keys_to_recheck.add(key)
        self._fleet.rank(seed)
        raise StillLeased(f"still in use: {counted(seed.leases, 'lease')}; the seed is draining")

    # --- presence ------------------------------------------------------------------------------------------------
    def attend(self, announcement: Announcement, *, held: bool) -> int:
        """Start a presence request; returns its number. Raises :class:`UnknownSeed`."""
        fleet = self._fleet
        seed = fleet.seeds.get(str(announcement.seed))
        if seed is None or _difference(seed, announcement):
            raise UnknownSeed(f"no seed {announcement.seed} with this key, fingerprint and epoch: announce it first")
        number = fleet.next_number()
        seed.presence, seed.attends = (number if held else 0), held
        self._seen(seed)
        self._returned(seed)
        self._grants.serve_waiters(seed)
        return number

    def leave(self, address: SeedAddress, number: int, *, answered: bool) -> None:
        """End the presence request ``number``, if it still is the seed's last one."""
        seed = self._fleet.seeds.get(str(address))
        if seed is None or seed.presence != number:
            return
        seed.presence = 0
        if answered:
            self._fleet.due.set(("presence", seed.name, ""), self._fleet.now + self._rules.presence_grace_s)
        else:
            self._mark_absent(seed, "its connection broke")

    def presence_overdue(self, seed: Seed) -> None:
        """Mark a seed absent that did not send its next request; give up on one that was absent already."""
        if not seed.absent:
            self._mark_absent(seed, "it did not send its next presence request")
            return
        seed.given_up = True
        self._fleet.keys_to_recheck.add(seed.key)
        self._fleet.rank(seed)

    def _mark_absent(self, seed: Seed, reason: str) -> None:
        fleet = self._fleet
        seed.absent, seed.absent_at = True, fleet.now
        fleet.due.set(("presence", seed.name, ""), fleet.now + self._rules.return_s)
        fleet.rank(seed)
        if not seed.draining:  # else it was withdrawn, and goes when its last lease ends
            self._store.observe(Event("seed_absent", seed.key, seed.name, reason))

    def _returned(self, seed: Seed) -> None:
        self._fleet.due.cancel(("presence", seed.name, ""))
        if seed.absent:
            seed.absent = seed.given_up = False
            self._store.observe(Event("seed_returned", seed.key, seed.name))


def _difference(seed: Seed | Lease, new: Announcement) -> str | None:
    """Return why ``new`` is another seed at the same address; None if it is the same one."""
    if seed.key != new.key:
        return "rekeyed"
    if new.epoch and seed.epoch and new.epoch != seed.epoch:
        return "new epoch"
    if new.fingerprint != seed.fingerprint:
        return "new fingerprint"
    return None
