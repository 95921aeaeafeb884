"""Search through the fleet: keys, seeds, receivers and pending loaders that contain a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.history import PastFork
from vllm_rfork.planner.store.key_state import KeyState
from vllm_rfork.planner.store.records import Lease, Seed, Waiter

#: Records that are examined before other calls have their turn.
BATCH = 500


@dataclass
class Found:
    """Everything that contains ``text``, without regard to case: at most ``limit`` records of each kind.

    Attributes:
        keys: those that contain it themselves, or of which a record was found.
        counts: how many records of each kind contain it.
    """

    text: str
    limit: int
    keys: dict[str, None] = field(default_factory=dict)
    seeds: list[Seed] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    waiting: list[tuple[int, Waiter]] = field(default_factory=list)
    intents: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("seeds", "leases", "waiting", "intents"), 0))

    def __post_init__(self) -> None:
        self.text = self.text.casefold()

    def matches(self, *parts: str) -> bool:
        """Return whether one of ``parts`` contains the text."""
        return any(self.text in each.casefold() for each in parts if each)

    def matches_past(self, past: PastFork) -> bool:
        """Return whether a past fork contains the text."""
        return self.matches(past.key, past.seed, past.receiver, past.pod, past.cause, past.lane)

    def look_into(self, fleet: FleetState, keys: Iterable[str]) -> Iterator[None]:
        """Search ``keys``, and yield after every :data:`BATCH` records. They may change meanwhile."""
        examined = 0
        for key in keys:
            key_state = fleet.keys.get(key)
            if key_state is None:
                continue
            use = fleet.use.get(key)
            if self.matches(key, *(() if use is None else use.names)):
                self.keys[key] = None
            for _ in self._records(fleet, key_state):
                examined += 1
                if examined % BATCH == 0:
                    yield
            examined += 1
            if examined % BATCH == 0:
                yield

    def _records(self, fleet: FleetState, key_state: KeyState) -> Iterator[None]:
        key = key_state.key
        for seed in list(key_state.seeds.values()):
            if self.matches(seed.name, seed.fingerprint, seed.parent, *seed.labels.values()):
                self._add("seeds", self.seeds, seed, key)
            yield
        for lease in list(key_state.leases.values()):
            if self.matches(lease.receiver, lease.host, lease.pod, lease.name):
                self._add("leases", self.leases, lease, key)
            yield
        for place, waiter in enumerate(list(key_state.waiters()), start=1):
            if self.matches(waiter.ask.receiver, waiter.ask.intent, *waiter.ask.labels.values()):
                self._add("waiting", self.waiting, (place, waiter), key)
            yield
        for intent in [fleet.intent(key, each) for each in key_state.intents]:
            if self.matches(intent.intent, intent.address, intent.host, intent.pod):
                self._add("intents", self.intents, (key, intent.intent), key)
            yield

    def _add(self, kind: str, records: list[Any], record: Any, key: str) -> None:
        self.keys[key] = None
        self.counts[kind] += 1
        if len(records) < self.limit:
            records.append(record)
