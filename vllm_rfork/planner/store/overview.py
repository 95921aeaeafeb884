"""The data of the dashboard: what needs attention first, and the start of every other list.

The cost grows with the number of keys and with ``limit``, never with that of seeds, leases, waiters or past forks,
unless a text is searched for: a page that many people look at must not slow the planner down. The form:

``fleet``: the counts over all keys, and ``models``, how many there are. ``scope``: the same counts over what is shown:
one key, one model, or the fleet; None if nothing is known about it. ``models`` and ``keys``: the same by model and by
key, the most urgent first. ``seeds``, ``leases``, ``waiting``, ``intents``, ``failures``, ``history``: entries as in a
snapshot, with ``counts`` of all that there are; seeds in trouble and old leases first. ``forks``: counts and rates over
the forks looked back at. ``causes``: the failures that are kept, by cause. ``fingerprints``: those of shown keys.
``tree``: the forks of one key, ``tree_key``.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_rfork.planner.store import snapshot
from vllm_rfork.planner.store.fingerprints import fingerprint_entries
from vllm_rfork.planner.store.fork_tree import fork_tree
from vllm_rfork.planner.store.key_use import KeyNames
from vllm_rfork.planner.store.prospects import prospects

if TYPE_CHECKING:
    from vllm_rfork.planner.store.fleet_state import FleetState
    from vllm_rfork.planner.store.history import History, PastFork
    from vllm_rfork.planner.store.key_state import KeyState
    from vllm_rfork.planner.store.records import Lease, Seed, Waiter
    from vllm_rfork.planner.store.search import Found
    from vllm_rfork.planner.store.tally import Counts, Tally

#: Keys that are counted before other calls have their turn.
BATCH = 500
#: Number of past forks that are counted by result.
LOOK_BACK = 1000
#: Minimum number of seeds and waiters of one key that are shown, however many keys there are.
SHARE = 4
#: Different causes of failure that are counted separately.
MAX_CAUSES = 20


@dataclass(frozen=True)
class View:
    """The part of the fleet that is shown, with at most ``limit`` entries a list."""

    key: str | None = None
    names: KeyNames | None = None
    found: Found | None = None
    limit: int = 100

    def shows_past(self, past: PastFork, tally: Tally) -> bool:
        """Return whether a past fork is part of it."""
        if self.key is not None and past.key != self.key:
            return False
        if self.names is not None and tally.named(past.key) != self.names:
            return False
        return self.found is None or self.found.matches_past(past)


def overview(fleet: FleetState, history: History, tally: Tally, view: View) -> dict[str, Any]:
    """See :meth:`vllm_rfork.planner.store.base.Store.overview`."""
    found, limit = view.found, view.limit
    among = None if found is None else found.keys
    in_view = tally.keys_of(view.names, among)
    first = tally.first(in_view, limit)
    if view.key is not None and tally.counts(view.key) is not None and view.key not in first:
        first.append(view.key)
    chosen = first if view.key is None else [each for each in first if each == view.key]
    models, model_count = tally.model_entries(in_view if found is not None or view.names is not None else None, limit)
    shown = [key_state for key in chosen if (key_state := fleet.keys.get(key)) is not None]
    return {
        "state": fleet.state_id,
        "age_s": round(fleet.now - fleet.born_at, 1),
        "fleet": tally.fleet.entry() | {"models": tally.model_count},
        "scope": _scope(tally, view),
        "found": None if found is None else {"keys": len(in_view), "models": model_count, **found.counts},
        "models": models,
        "keys": tally.key_entries(first),
        **_lists(fleet, _Records.of(fleet, shown, view)),
        **_past(history, tally, view, fleet.now),
        "fingerprints": list(
            itertools.islice((each for key_state in shown for each in _fingerprints(key_state, view)), limit)
        ),
        **_tree(shown, view),
    }


def _scope(tally: Tally, view: View) -> dict[str, Any] | None:
    counts: Counts | None = tally.fleet
    if view.key is not None:
        counts = tally.counts(view.key)
    elif view.names is not None:
        counts = tally.model(view.names)
    return None if counts is None else counts.entry()


def _fingerprints(key_state: KeyState, view: View) -> list[dict[str, Any]]:
    """Return the fingerprints of a key; in a view of several keys only if there are workers that cannot be paired."""
    entries = fingerprint_entries(key_state)
    return entries if view.key is not None or len(entries) > 1 else []


def _tree(shown: list[KeyState], view: View) -> dict[str, Any]:
    """``tree`` and ``tree_key``: of the key that is shown, or of the first one of a model, whose ranks fork alike."""
    key_states = sorted(shown, key=lambda each: each.key)[:1] if view.key is not None or view.names is not None else []
    if not key_states:
        return {"tree": [], "tree_key": None}
    return {"tree": fork_tree(key_states[0].seeds.values()), "tree_key": key_states[0].key}


@dataclass(frozen=True)
class _Records:
    """The records that are shown, at most ``limit`` of each kind."""

    seeds: list[Seed]
    leases: list[Lease]
    waiting: list[tuple[int, Waiter]]
    intents: list[tuple[str, str]]

    @classmethod
    def of(cls, fleet: FleetState, shown: list[KeyState], view: View) -> _Records:
        """Share the entries out among the keys of ``shown``, or take those that were found."""
        found, limit = view.found, view.limit
        if found is not None:
            return cls(
                [each for each in found.seeds if each.name in fleet.seeds],
                [each for each in found.leases if each.user_id in fleet.leases],
                [each for each in found.waiting if each[1].ticket in fleet.waiters],
                [each for each in found.intents if fleet.has_intent(*each)],
            )

        def share(keys: int) -> int:
            return max(SHARE, limit // max(keys, 1))

        of_seeds, of_leases = share(len(shown)), share(sum(bool(each.leases) for each in shown))
        of_waiters = share(sum(bool(each.queues) for each in shown))
        seeds = (seed for each in shown for seed in itertools.islice(_troubled_first(each), of_seeds))
        leases = (lease for each in shown for lease in itertools.islice(each.leases.values(), of_leases))
        waiting = (pair for each in shown for pair in enumerate(itertools.islice(each.waiters(), of_waiters), start=1))
        intents = ((each.key, intent) for each in shown for intent in each.intents)
        return cls(
            list(itertools.islice(seeds, limit)),
            list(itertools.islice(leases, limit)),
            list(itertools.islice(waiting, limit)),
            list(itertools.islice(intents, limit)),
        )


def _troubled_first(key_state: KeyState) -> Iterator[Seed]:
    """Yield all seeds, those in trouble first. Lazily: there may be many of either kind."""
    groups = (key_state.quarantined, key_state.absent, key_state.draining, key_state.seeds)
    for place, names in enumerate(groups):
        for name in names:
            if not any(name in earlier for earlier in groups[:place]):
                yield key_state.seeds[name]


def _lists(fleet: FleetState, records: _Records) -> dict[str, Any]:
    """``seeds``, ``leases``, ``waiting`` and ``intents``, with what is expected of them."""
    now = fleet.now
    leases = [
        snapshot.lease_entry(each, now) | {"expected_s": _measured(fleet, each.key, "hold_s")}
        for each in records.leases
    ]
    return {
        "seeds": [snapshot.seed_entry(each, now) for each in records.seeds],
        "leases": sorted(leases, key=lambda each: -each["held_s"]),
        "waiting": [
            snapshot.waiter_entry(place, each, now) | _expected(fleet, each) for place, each in records.waiting
        ],
        "intents": [
            snapshot.intent_entry(fleet.intent(*each), now) | {"expected_s": _measured(fleet, each[0], "load_s")}
            for each in records.intents
        ],
    }


def _measured(fleet: FleetState, key: str, name: str) -> float | None:
    """Return a measured mean time of a key in seconds; None if there is none."""
    times = fleet.times.get(key)
    return round(getattr(times, name), 1) or None if times is not None else None


def _expected(fleet: FleetState, waiter: Waiter) -> dict[str, Any]:
    """Return the rest of a wait, by the measured times of its key, and what it waits for."""
    verdict = prospects(fleet, waiter.ask, waiter.since, waiter.number, waiter.bound_s or None)
    key_state = fleet.keys.get(waiter.ask.key)
    loading_since = None if key_state is None else key_state.oldest_load(waiter.ask)
    return {
        "expected_s": None if verdict.expected_s is None else round(verdict.expected_s, 1),
        "reason": verdict.reason,
        "loading_s": None if loading_since is None else round(fleet.now - loading_since, 1),
        "load_s": _measured(fleet, waiter.ask.key, "load_s"),
        "hold_s": _measured(fleet, waiter.ask.key, "hold_s"),
    }


def _past(history: History, tally: Tally, view: View, now: float) -> dict[str, Any]:
    """``history``, ``failures``, ``forks`` and ``causes`` of past forks, the youngest first."""

    def entries(past: Iterable[PastFork]) -> list[dict[str, Any]]:
        return [snapshot.past_fork(vars(each), now) for each in past if view.shows_past(each, tally)]

    past = entries(itertools.islice(reversed(history), LOOK_BACK))
    failures = entries(reversed(history.failures))
    results = dict.fromkeys(("ok", "failed", "released", "expired"), 0)
    for each in past:
        results[each["result"]] += 1
    # The duration of a lease is not that of its transfer.
    rates = [each["gb_per_s"] for each in past if each["gb_per_s"] and not each["of_lease"]]
    return {
        "history": past[: view.limit],
        "failures": failures[: view.limit],
        "forks": {
            "count": len(past),
            **results,
            "nbytes": sum(each["nbytes"] for each in past),
            "gb_per_s": round(statistics.median(rates), 3) if rates else None,
            "since_s": past[-1]["ago_s"] if past else None,
        },
        "causes": _causes(failures),
        "failures_kept": len(failures),
    }


def _causes(failures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    causes: dict[str, dict[str, Any]] = {}
    for each in failures:
        name = each["cause"] or each["result"]
        if name not in causes and len(causes) >= MAX_CAUSES:
            name = "(other)"
        seen = causes.setdefault(
            name, {"cause": name, "count": 0, "ago_s": each["ago_s"], "seed": each["seed"], "key": each["key"]}
        )
        seen["count"] += 1
    return sorted(causes.values(), key=lambda each: (-each["count"], each["cause"]))
