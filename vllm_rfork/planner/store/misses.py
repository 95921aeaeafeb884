"""The reason for a miss, and the seeds of the key with other fingerprints: for people.

The cost does not grow with the number of seeds: of large sets only a part is examined.
"""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

from vllm_rfork.messages import MAX_OTHERS, OtherSeeds

if TYPE_CHECKING:
    from vllm_rfork.planner.store.base import Ask
    from vllm_rfork.planner.store.key_state import KeyState

#: Fingerprints of a key, and quarantined seeds, that are examined.
EXAMINED = 1_000


def reason_for(key_state: KeyState | None, ask: Ask) -> str:
    """Return one of ``messages.MISSES`` for an ``ask`` that found no seed. ``key_state`` None: the key is unknown."""
    if key_state is None or not key_state.seeds:
        return "none"
    prints = [ask.fingerprint, ""] if ask.fingerprint else list(key_state.by_fingerprint)
    pools = [names for each in prints if (names := key_state.by_fingerprint.get(each))]
    if not pools:
        return "fingerprint"
    suitable = itertools.chain.from_iterable(pools)
    if all(name in ask.exclude for name in itertools.islice(suitable, len(ask.exclude) + 1)):
        return "excluded"
    serving = itertools.chain.from_iterable(key_state.serving.get(each, ()) for each in prints)
    if any(name not in ask.exclude for name in itertools.islice(serving, len(ask.exclude) + 1)):
        return "busy"
    quarantined = itertools.islice(key_state.quarantined, EXAMINED)
    if any(name not in ask.exclude and any(name in names for names in pools) for name in quarantined):
        return "quarantined"
    return "none"  # all are draining


def others_for(key_state: KeyState | None, ask: Ask) -> tuple[OtherSeeds, ...]:
    """Return the fingerprints that most seeds of the key have, other than the one of ``ask``."""
    if key_state is None or not ask.fingerprint:
        return ()
    others = [
        (len(names), each)
        for each, names in itertools.islice(key_state.by_fingerprint.items(), EXAMINED)
        if each not in (ask.fingerprint, "")
    ]
    found = []
    for count, fingerprint in heapq.nlargest(MAX_OTHERS, others):
        names = key_state.serving.get(fingerprint) or key_state.by_fingerprint[fingerprint]
        found.append(OtherSeeds(fingerprint, count, key_state.seeds[next(iter(names))].address))
    return tuple(found)
