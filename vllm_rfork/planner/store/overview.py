"""The data of the dashboard: the keys that need attention first, and the start of every other list.

The cost grows with the number of keys and with ``limit``, never with that of seeds, leases, waiters or past forks: a
page that many people look at must not slow the planner down. The form:

``fleet``: the counts of ``Totals`` over all keys, and ``keys``, how many there are. ``keys``: the same by ``key``, the
most urgent first. ``seeds``, ``leases``, ``waiting``, ``intents``, ``history``: entries as in a snapshot, of one key
where asked for; seeds in trouble and old leases first. ``forks``: counts and rates over the forks looked back at.
``causes``: the failures among those, by cause.
"""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_rfork.planner.store import snapshot
from vllm_rfork.planner.store.base import Totals

if TYPE_CHECKING:
    from vllm_rfork.planner.store.fleet_state import FleetState
    from vllm_rfork.planner.store.key_state import KeyState
    from vllm_rfork.planner.store.records import Seed

#: Keys that are counted before other calls have their turn.
BATCH = 500
#: Number of past forks that are counted by result and cause.
LOOK_BACK = 1000
#: Minimum number of seeds and waiters of one key that are shown, however many keys there are.
SHARE = 4
#: Different causes of failure that are counted separately.
MAX_CAUSES = 20
_FAILED = ("failed", "expired")


class Tally:
    """The sum of the counts of all keys, and the order of the keys."""

    def __init__(self) -> None:
        self.fleet = Totals()
        self.keys = 0
        self._levels: tuple[dict[str, Totals], ...] = ({}, {}, {}, {})

    def add(self, key: str, totals: Totals) -> None:
        """Add a key, which must be new."""
        self._levels[_urgency(totals)][key] = totals
        self.keys += 1
        self.fleet.add(totals)

    def first(self, limit: int, key: str | None) -> dict[str, Totals]:
        """Return the most urgent keys, each level by name, and ``key`` if it is known."""
        found: dict[str, Totals] = {}
        for level in reversed(self._levels):
            for name in heapq.nsmallest(limit - len(found), level):
                found[name] = level[name]
            if key is not None and key in level and key not in found:
                found[key] = level[key]
        return found


@dataclass(frozen=True)
class Choice:
    """The keys to show, and those whose seeds, leases and waiters are shown; with the maximum number of each."""

    first: dict[str, Totals]
    chosen: list[str]
    seeds: int
    leases: int
    waiting: int
    limit: int


def choose(tally: Tally, key: str | None, limit: int) -> Choice:
    """Share ``limit`` out among the keys of ``tally``, or give it to ``key``."""
    first = tally.first(limit, key)
    chosen = list(first) if key is None else [each for each in first if each == key]

    def share(keys: int) -> int:
        return max(SHARE, limit // max(keys, 1))

    return Choice(
        first,
        chosen,
        share(len(chosen)),
        share(sum(first[each].leases > 0 for each in chosen)),
        share(sum(first[each].waiting > 0 for each in chosen)),
        limit,
    )


def _urgency(totals: Totals) -> int:
    """Return 3 if receivers wait, 2 if seeds are quarantined or absent, 1 if the key is in use, otherwise 0."""
    if totals.waiting:
        return 3
    if totals.aside or totals.absent:
        return 2
    return 1 if totals.leases or totals.draining or totals.intents else 0


def overview(
    fleet: FleetState, history: Sequence[snapshot.PastFork], tally: Tally, *, key: str | None, limit: int
) -> dict[str, Any]:
    """See :meth:`vllm_rfork.planner.store.base.Store.overview`."""
    now = fleet.now
    choice = choose(tally, key, limit)
    shown = [key_state for name in choice.chosen if (key_state := fleet.keys.get(name)) is not None]
    seeds = (seed for each in shown for seed in itertools.islice(_seeds(each), choice.seeds))
    leases = (lease for each in shown for lease in itertools.islice(each.leases.values(), choice.leases))
    waiting = (pair for each in shown for pair in enumerate(itertools.islice(each.waiters(), choice.waiting), start=1))
    intents = ((each.key, *pair) for each in shown for pair in each.intents.items())
    forks = (snapshot.past_fork(vars(each), now) for each in itertools.islice(reversed(history), LOOK_BACK))
    return {
        "state": fleet.state_id,
        "age_s": round(now - fleet.born_at, 1),
        **_counted(tally, choice),
        "seeds": [snapshot.seed_entry(each, now) for each in itertools.islice(seeds, limit)],
        "leases": _oldest_first(snapshot.lease_entry(each, now) for each in itertools.islice(leases, limit)),
        "waiting": [snapshot.waiter_entry(place, each, now) for place, each in itertools.islice(waiting, limit)],
        "intents": [
            {"key": name, "intent": intent, "fingerprint": print_}
            for name, intent, print_ in itertools.islice(intents, limit)
        ],
        **_past(forks, key, limit),
    }


def _seeds(key_state: KeyState) -> Iterator[Seed]:
    """Yield all seeds, those in trouble first. Lazily: there may be many of either kind."""
    groups = (key_state.quarantined, key_state.absent, key_state.draining, key_state.seeds)
    for place, names in enumerate(groups):
        for name in names:
            if not any(name in earlier for earlier in groups[:place]):
                yield key_state.seeds[name]


def _oldest_first(leases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(leases, key=lambda each: -each["held_s"])


def _counted(tally: Tally, choice: Choice) -> dict[str, Any]:
    """``fleet`` and ``keys``."""
    return {
        "fleet": _rounded(tally.fleet) | {"keys": tally.keys},
        "keys": [{"key": name} | _rounded(totals) for name, totals in choice.first.items()],
    }


def _rounded(totals: Totals) -> dict[str, Any]:
    return {**vars(totals), "oldest_wait_s": round(totals.oldest_wait_s, 1)}


def _past(forks: Iterable[dict[str, Any]], key: str | None, limit: int) -> dict[str, Any]:
    """``history``, ``forks`` and ``causes`` of past forks, the youngest first."""
    past = [each for each in forks if key is None or each["key"] == key]
    results = dict.fromkeys(("ok", "failed", "released", "expired"), 0)
    causes: dict[str, dict[str, Any]] = {}
    for each in past:
        results[each["result"]] += 1
        if each["result"] in _FAILED:
            name = each["cause"] or each["result"]
            if name not in causes and len(causes) >= MAX_CAUSES:
                name = "(other)"
            seen = causes.setdefault(
                name, {"cause": name, "count": 0, "ago_s": each["ago_s"], "seed": each["seed"], "key": each["key"]}
            )
            seen["count"] += 1
    # The duration of a lease is not that of its transfer.
    rates = [each["gb_per_s"] for each in past if each["gb_per_s"] and not each["of_lease"]]
    return {
        "history": past[:limit],
        "forks": {
            "count": len(past),
            **results,
            "nbytes": sum(each["nbytes"] for each in past),
            "gb_per_s": round(statistics.median(rates), 3) if rates else None,
            "since_s": past[-1]["ago_s"] if past else None,
        },
        "causes": sorted(causes.values(), key=lambda each: (-each["count"], each["cause"])),
    }
