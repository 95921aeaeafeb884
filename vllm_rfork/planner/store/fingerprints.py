"""The fingerprints of keys, for people: workers with different ones are never paired."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

from vllm_rfork.planner.store.key_state import KeyState

#: Fingerprints of one key that are shown.
MAX_SHOWN = 8
#: Seeds of one fingerprint in which a report of differences is looked for.
EXAMINED = 20


def fingerprint_entries(key_state: KeyState) -> list[dict[str, Any]]:
    """Return the fingerprints of a key, those with most seeds first.

    Each with the number of seeds, waiting receivers and pending loaders that have it, one of the seeds, and the
    differences to others that one of the seeds reported.
    """
    seeds = Counter({print_: len(names) for print_, names in key_state.by_fingerprint.items()})
    waiting = Counter({print_: len(queue) for print_, queue in key_state.queues.items()})
    everywhere = seeds + waiting + key_state.intent_counts
    order = sorted(everywhere, key=lambda each: (-seeds[each], -everywhere[each], each))
    return [_entry(key_state, each, seeds[each], waiting[each]) for each in order[:MAX_SHOWN]]


def _entry(key_state: KeyState, fingerprint: str, seeds: int, waiting: int) -> dict[str, Any]:
    some = [key_state.seeds[name] for name in itertools.islice(key_state.by_fingerprint.get(fingerprint, ()), EXAMINED)]
    return {
        "key": key_state.key,
        "fingerprint": fingerprint,
        "seeds": seeds,
        "waiting": waiting,
        "intents": key_state.intent_counts[fingerprint],
        "example": some[0].name if some else "",
        "differs": next((each.differs for each in some if each.differs), ""),
    }
