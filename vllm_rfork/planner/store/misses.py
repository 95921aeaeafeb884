"""Why a receiver gets no seed, and which seeds of its key have another fingerprint: for people, deciding nothing.

The cost does not grow with the number of seeds: of large sets a part is looked at.
"""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING

from vllm_rfork.messages import MAX_OTHERS, OtherSeeds

if TYPE_CHECKING:
    from vllm_rfork.planner.store.base import Ask
    from vllm_rfork.planner.store.fleet import Shelf

#: Fingerprints of a key, and quarantined seeds, that are looked at.
LOOKED_AT = 1_000


def reason_for(shelf: Shelf | None, ask: Ask) -> str:
    """One of ``messages.MISSES``, for an ``ask`` that finds no seed. ``shelf`` None: nothing is known about the key."""
    if shelf is None or not shelf.seeds:
        return "none"
    prints = [ask.fingerprint, ""] if ask.fingerprint else list(shelf.prints)
    pools = [names for each in prints if (names := shelf.prints.get(each))]
    if not pools:
        return "fingerprint"
    suitable = itertools.chain.from_iterable(pools)
    if all(name in ask.exclude for name in itertools.islice(suitable, len(ask.exclude) + 1)):
        return "excluded"
    serving = itertools.chain.from_iterable(shelf.serving.get(each, ()) for each in prints)
    if any(name not in ask.exclude for name in itertools.islice(serving, len(ask.exclude) + 1)):
        return "busy"
    aside = itertools.islice(shelf.aside, LOOKED_AT)
    if any(name not in ask.exclude and any(name in names for names in pools) for name in aside):
        return "quarantined"
    return "none"  # what there is has said that it goes


def others_for(shelf: Shelf | None, ask: Ask) -> tuple[OtherSeeds, ...]:
    """The fingerprints that most seeds of the key have, other than the one of ``ask``."""
    if shelf is None or not ask.fingerprint:
        return ()
    others = [
        (len(names), each)
        for each, names in itertools.islice(shelf.prints.items(), LOOKED_AT)
        if each not in (ask.fingerprint, "")
    ]
    return tuple(
        OtherSeeds(each, count, shelf.seeds[next(iter(shelf.serving.get(each) or shelf.prints[each]))].address)
        for count, each in heapq.nlargest(MAX_OTHERS, others)
    )
