"""Records about keys that outlive their seeds. Their number is bounded, so that some make room for new ones."""

from __future__ import annotations

from vllm_rfork.planner.store.estimates import KeyTimes
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.key_use import KeyNames, KeyUse


def times_of(fleet: FleetState, key: str) -> KeyTimes:
    """Return the measured times of ``key``, to add to. The oldest make room for new ones."""
    times = fleet.times.get(key)
    if times is None:
        if len(fleet.times) >= fleet.rules.max_keys:
            del fleet.times[next(iter(fleet.times))]
        times = fleet.times[key] = KeyTimes()
    return times


def use_of(fleet: FleetState, key: str) -> KeyUse:
    """Return the use of ``key``, to add to. The oldest of keys without seeds, waiters and loaders make room.

    Any caller can ask for a key that nobody has. If all kept ones are in use, the new one is not kept.
    """
    use = fleet.use.get(key)
    if use is None:
        use = KeyUse()
        if len(fleet.use) >= fleet.rules.max_keys:
            unused = next((each for each in fleet.use if each not in fleet.keys), None)
            if unused is None:
                return use
            del fleet.use[unused]
        fleet.use[key] = use
    return use


def name_key(fleet: FleetState, key: str, names: KeyNames, *, by_seed: bool = False) -> None:
    """Give ``key`` the names that a worker sent; the first ones stay, and only the key's first seed replaces them.

    Otherwise any caller could rename a key for everybody, and each name would begin other series of metrics.
    """
    if not names.model:
        return
    use = use_of(fleet, key)
    if not use.model or (by_seed and len(fleet.keys[key].seeds) == 1):
        use.name(names)
