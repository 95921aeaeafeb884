"""Counts of keys and models, and the order in which the dashboard shows them: the most urgent first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm_rfork.planner.store.base import Totals
from vllm_rfork.planner.store.estimates import KeyTimes
from vllm_rfork.planner.store.key_use import KeyNames, KeyUse

_UNUSED = KeyUse()
_UNMEASURED = KeyTimes()


@dataclass
class Counts:
    """The counts of one key, one model or the fleet.

    Attributes:
        seedless: keys without a seed.
        load_s: the longest mean load of a key in seconds; 0: none was measured.
        fork_s: the longest mean fork, likewise.
    """

    totals: Totals = field(default_factory=Totals)
    keys: int = 0
    seedless: int = 0
    forked: int = 0
    loaded: int = 0
    saved_s: float = 0.0
    load_s: float = 0.0
    fork_s: float = 0.0

    def add(self, totals: Totals, use: KeyUse, times: KeyTimes) -> None:
        """Add one key."""
        self.totals.add(totals)
        self.keys += 1
        self.seedless += not totals.seeds
        self.forked += use.forked
        self.loaded += use.loaded
        self.saved_s += use.saved_s
        self.load_s = max(self.load_s, times.load_s)
        self.fork_s = max(self.fork_s, times.fork_s)

    @property
    def urgency(self) -> int:
        """3 if receivers wait, 2 if seeds are quarantined or absent, 1 if the key is in use, otherwise 0."""
        totals = self.totals
        if totals.waiting:
            return 3
        if totals.aside or totals.absent:
            return 2
        return 1 if totals.leases or totals.draining or totals.intents else 0

    def entry(self) -> dict[str, Any]:
        """Return the counts, for people."""
        return {
            **vars(self.totals),
            "oldest_wait_s": round(self.totals.oldest_wait_s, 1),
            "keys": self.keys,
            "seedless": self.seedless,
            "forked": self.forked,
            "loaded": self.loaded,
            "saved_s": round(self.saved_s, 1),
            "load_s": round(self.load_s, 1),
            "fork_s": round(self.fork_s, 1),
        }


class Tally:
    """The counts of the fleet, of each model and of each key.

    A key that no worker has named is a model of its own.
    """

    def __init__(self) -> None:
        self.fleet = Counts()
        self._keys: dict[str, Counts] = {}
        self._names: dict[str, KeyNames] = {}
        self._models: dict[KeyNames | str, Counts] = {}

    def add(self, key: str, totals: Totals, use: KeyUse | None, times: KeyTimes | None) -> None:
        """Add a key, which must be new."""
        use, times = use or _UNUSED, times or _UNMEASURED
        names = use.names if use.model else None
        model = self._models.setdefault(names or key, Counts())
        counts = self._keys[key] = Counts()
        for each in (self.fleet, model, counts):
            each.add(totals, use, times)
        if names is not None:
            self._names[key] = names

    @property
    def model_count(self) -> int:
        """Number of models."""
        return len(self._models)

    def named(self, key: str) -> KeyNames | None:
        """Return the names of ``key``, if it has some."""
        return self._names.get(key)

    def keys_of(self, names: KeyNames | None, among: Iterable[str] | None = None) -> list[str]:
        """Return all keys with ``names``, or all; of those in ``among``, if given."""
        chosen = self._keys if among is None else [each for each in among if each in self._keys]
        return list(chosen) if names is None else [key for key in chosen if self._names.get(key) == names]

    def first(self, keys: Iterable[str], limit: int) -> list[str]:
        """Return the most urgent of ``keys``, each level by name."""
        return heapq.nsmallest(limit, keys, key=lambda key: (-self._keys[key].urgency, key))

    def counts(self, key: str) -> Counts | None:
        """Return the counts of ``key``; None if it is unknown."""
        return self._keys.get(key)

    def model(self, names: KeyNames) -> Counts | None:
        """Return the counts of all keys with ``names``; None if there are none."""
        return self._models.get(names)

    def key_entries(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """Return the counts of ``keys``, for people."""
        return [{"key": key, **self._named(key), **self._keys[key].entry()} for key in keys]

    def model_entries(self, keys: Iterable[str] | None, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Return the most urgent models, for people, and how many there are; those of ``keys``, if given."""
        models: Iterable[KeyNames | str] = self._models
        if keys is not None:
            models = dict.fromkeys(self._names.get(key) or key for key in keys)
        count = len(self._models) if keys is None else len(list(models))
        first = heapq.nsmallest(limit, models, key=lambda name: (-self._models[name].urgency, _title(name)))
        return [
            {"key": name if isinstance(name, str) else "", **_names(name), **self._models[name].entry()}
            for name in first
        ], count

    def _named(self, key: str) -> dict[str, str]:
        return _names(self._names.get(key) or key)


def _names(name: KeyNames | str) -> dict[str, str]:
    names = KeyNames() if isinstance(name, str) else name
    return {"model": names.model, "strategy": names.strategy}


def _title(name: KeyNames | str) -> tuple[str, str]:
    return (name, "") if isinstance(name, str) else name
