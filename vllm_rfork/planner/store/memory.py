"""The in-memory store: one process, no dependencies; each decision happens between two awaits and is atomic.

Everything that is due is done before each decision, so that a lease that has expired never outlives it; ``sweep`` does
it when no call comes. The Redis store decides with this one as well, and writes what changes.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm_rfork.messages import SeedAddress
from vllm_rfork.messages.metering import Served
from vllm_rfork.planner.store import overview, snapshot
from vllm_rfork.planner.store.base import (
    Announcement,
    Ask,
    Event,
    Granted,
    Missed,
    Outcome,
    Queued,
    Released,
    Rules,
    Store,
    Totals,
)
from vllm_rfork.planner.store.earlier_leases import EarlierLeases
from vllm_rfork.planner.store.errors import LimitReached, UnknownLease
from vllm_rfork.planner.store.estimates import KeyTimes
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.grants import STALE_BATCH, Grants
from vllm_rfork.planner.store.history import FailedFork, History, PastFork
from vllm_rfork.planner.store.journal import Journal
from vllm_rfork.planner.store.kept_keys import name_key
from vllm_rfork.planner.store.key_use import UNNAMED, KeyNames, KeyUse
from vllm_rfork.planner.store.operators import Operators
from vllm_rfork.planner.store.queue import Queue
from vllm_rfork.planner.store.records import Drain, Intent, Lease, Seed
from vllm_rfork.planner.store.restore import restore_drain, restore_intent, restore_lease, restore_seed
from vllm_rfork.planner.store.search import Found
from vllm_rfork.planner.store.seed_lifecycle import SeedLifecycle
from vllm_rfork.planner.store.tally import Tally

#: Entries of a snapshot that are made at once, before others have their turn.
SLICE = 500


class MemoryStore(Store):
    """The fleet's state in this process.

    Args:
        clock: seconds that never go backwards.
        journal: notes what changes, for a store that writes it.
    """

    def __init__(
        self, rules: Rules, clock: Callable[[], float] = time.monotonic, journal: Journal | None = None
    ) -> None:
        super().__init__(rules)
        self._clock = clock
        self._fleet = FleetState(rules, clock(), journal)
        self._history = History(rules.max_history, journal)
        self._grants = Grants(self._fleet, self._history, self)
        self._earlier = EarlierLeases(self._fleet, self)
        self._operators = Operators(self._fleet, self._grants, self)
        self._seeds = SeedLifecycle(self._fleet, self._grants, self._earlier, self._operators, self)
        self._queue = Queue(self._fleet, self._grants)
        self._decision = _Decision(self)

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to release."""

    async def ping(self) -> None:
        """Return: memory is always available."""

    # --- decisions -----------------------------------------------------------------------------------------------
    async def announce(self, announcement: Announcement) -> tuple[str, Served]:
        """See the port."""
        with self._decision:
            return self._seeds.announce(announcement)

    async def find(self, key: str) -> SeedAddress | None:
        """See the port."""
        with self._decision:
            return self._seeds.find(key)

    async def attend(self, announcement: Announcement, *, held: bool) -> int:
        """See the port."""
        with self._decision:
            return self._seeds.attend(announcement, held=held)

    async def leave(self, seed: SeedAddress, number: int, *, answered: bool) -> None:
        """See the port."""
        with self._decision:
            self._seeds.leave(seed, number, answered=answered)

    async def withdraw(self, key: str, seed: SeedAddress) -> None:
        """See the port."""
        with self._decision:
            self._seeds.withdraw(key, seed)

    async def drain(self, key: str, seed: SeedAddress, *, undo: bool) -> int:
        """See the port."""
        with self._decision:
            return self._operators.drain(key, seed, undo=undo)

    async def lift(self, key: str, seed: SeedAddress) -> bool:
        """See the port."""
        with self._decision:
            return self._operators.lift(key, seed)

    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """See the port."""
        with self._decision:
            return self._queue.acquire(ask)

    async def settle(self, ticket: str, *, leave: bool, loads: bool = True) -> Granted | Missed | Queued | None:
        """See the port."""
        with self._decision:
            return self._queue.settle(ticket, leave=leave, loads=loads)

    async def park(self, ticket: str, *, hung_up: bool = False) -> Granted | Missed | Queued | None:
        """See the port."""
        with self._decision:
            return self._queue.park(ticket, hung_up=hung_up)

    async def release(self, seed: SeedAddress, user_id: str, outcome: Outcome | None) -> Released:
        """See the port."""
        with self._decision as fleet:
            lease = fleet.leases.get(user_id)
            if lease is None or not _names(seed, lease):
                self._earlier.forget(str(seed), user_id)
                raise UnknownLease("no such lease")
            return self._grants.release(lease, outcome)

    async def renew(self, seed: SeedAddress, user_id: str) -> None:
        """See the port."""
        with self._decision as fleet:
            lease = fleet.leases.get(user_id)
            if lease is None and self._earlier.may_be(user_id):
                lease = self._earlier.renew(str(seed), user_id)
                if lease is None:
                    return
            if lease is None or not _names(seed, lease):
                raise UnknownLease("no such lease")
            lease.confirmed = True
            fleet.extend(lease)

    async def intend(
        self, key: str, intent: str, fingerprint: str, ttl_s: float, *, names: KeyNames = UNNAMED, address: str = ""
    ) -> None:
        """See the port."""
        with self._decision as fleet:
            name_key(fleet, key, names)
            if ttl_s <= 0:
                fleet.drop_intent(key, intent)
            elif not fleet.add_intent(Intent(key, intent, fingerprint, ttl_s, fleet.now, address)):
                raise LimitReached("there are too many intents or keys already")

    async def sweep(self) -> float:
        """See the port."""
        with self._decision as fleet:
            upcoming = [at for each in (fleet.due, fleet.stale) if (at := each.next()) is not None]
            return max(0.0, min(upcoming) - fleet.now) if upcoming else float("inf")

    # --- time ----------------------------------------------------------------------------------------------------
    def begin(self) -> FleetState:
        """Start a decision: do what is due."""
        fleet = self._fleet
        fleet.now = self._clock()
        for kind, name, other in fleet.due.due(fleet.now):
            if kind == "lease":
                self._grants.expire(fleet.leases[name])
            elif kind == "intent":
                fleet.drop_intent(name, other)
                self.observe(Event("intent_expired", name))
            elif kind == "quarantine":
                self._grants.end_quarantine(fleet.seeds[name])
            elif kind == "presence":
                self._seeds.presence_overdue(fleet.seeds[name])
            else:
                fleet.forget_ticket(name)
        # A planner that was paused finds all its seeds stale at once. Those that are left are not granted meanwhile.
        for _, name, _ in itertools.islice(fleet.stale.due(fleet.now), STALE_BATCH):
            self._grants.drop_stale_seed(fleet.seeds[name])
        return fleet

    def finish(self) -> None:
        """End a decision."""
        if self._fleet.keys_to_recheck or self._fleet.keys_to_prune:
            self._grants.finish()

    # --- what an earlier leader wrote ----------------------------------------------------------------------------
    def resume(self, state_id: str, born_at: float) -> None:
        """Continue an earlier leader's state, which began at ``born_at`` on the clock."""
        with self._decision as fleet:
            fleet.state_id, fleet.born_at = state_id, born_at

    def restore(self, name: str, record: object) -> None:
        """Take over one record of an earlier leader, with its full time. Raises :class:`LimitReached`.

        Past forks must come in the order of their names, which are numbers.
        """
        with self._decision as fleet:
            if isinstance(record, Seed):
                restore_seed(fleet, record)
            elif isinstance(record, Lease):
                restore_lease(fleet, record)
            elif isinstance(record, Drain):
                restore_drain(fleet, name, record)
            elif isinstance(record, Intent):
                restore_intent(fleet, record)
            elif isinstance(record, KeyTimes):
                fleet.times[name] = record
            elif isinstance(record, KeyUse):
                fleet.use[name] = record
            elif isinstance(record, FailedFork):
                self._history.failures.restore(int(name), record)
            elif isinstance(record, PastFork):
                self._history.restore(int(name), record)
            else:
                raise TypeError(f"no such record: {type(record).__name__}")

    # --- for people ----------------------------------------------------------------------------------------------
    async def totals(self) -> dict[str, Totals]:
        """See the port."""
        with self._decision as fleet:
            return {name: each.totals(fleet.now) for name, each in fleet.keys.items()}

    def names_of(self, key: str) -> KeyNames:
        """See the port."""
        use = self._fleet.use.get(key)
        return UNNAMED if use is None else use.names

    async def snapshot_slices(
        self, *, key: str | None = None, limit: int = 1000
    ) -> AsyncIterator[tuple[str, str | float | list[Any] | dict[str, Any]]]:
        """See the port."""
        with self._decision as fleet:
            head = snapshot.snapshot_head(fleet)
            lists = list(snapshot.snapshot_lists(fleet, self._history, key=key, limit=limit))
        for name, value in head.items():
            yield name, value
        for name, records, entry in lists:
            kind = dict if name == "keys" else list
            yield name, kind()
            for at in range(0, len(records), SLICE):
                await asyncio.sleep(0)
                now = self._clock()
                yield name, kind(entry(each, now) for each in records[at : at + SLICE])

    async def overview(
        self, *, key: str | None = None, names: KeyNames | None = None, find: str = "", limit: int = 100
    ) -> dict[str, Any]:
        """See the port."""
        tally = Tally()
        keys = list(self._fleet.keys)
        for at in range(0, len(keys), overview.BATCH):
            with self._decision as fleet:
                for name in keys[at : at + overview.BATCH]:
                    if (key_state := fleet.keys.get(name)) is not None:
                        tally.add(name, key_state.totals(fleet.now), fleet.use.get(name), fleet.times.get(name))
            await asyncio.sleep(0)
        found = Found(find, limit) if find else None
        if found is not None:
            for _ in found.look_into(self._fleet, tally.keys_of(names) if key is None else [key]):
                await asyncio.sleep(0)
        with self._decision as fleet:
            return overview.overview(fleet, self._history, tally, overview.View(key, names, found, limit))


class _Decision:
    """``with`` this around everything that reads or changes the state."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def __enter__(self) -> FleetState:
        return self._store.begin()

    def __exit__(self, *_: object) -> None:
        self._store.finish()


def _names(seed: SeedAddress, lease: Lease) -> bool:
    """Return whether ``lease`` is on ``seed``. The rank does not count: newer receivers may omit it."""
    return lease.name.rpartition(":")[0] == f"{seed.host}:{seed.port}"
