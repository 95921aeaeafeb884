"""The trees of forks of one key: which seed was forked from which, for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from vllm_rfork.planner.store.records import Seed

#: Seeds of a key that are examined.
MAX_EXAMINED = 20_000
#: Entries of all trees; lines that count what is left out come on top.
MAX_ENTRIES = 150
#: Entries with the same parent.
MAX_SIBLINGS = 12


def fork_tree(seeds: Iterable[Seed]) -> list[dict[str, Any]]:
    """Return the trees as one list, each seed before those that were forked from it, the largest tree first.

    An entry has ``depth`` from 0, ``seed``, ``forks`` (seeds below it), ``labels`` and ``gone`` (the seed is not known
    any more). An entry with ``more`` in place of ``seed`` counts further seeds with the same parent, and those below.
    """
    known = {each.name: each for each in itertools.islice(seeds, MAX_EXAMINED)}
    children: dict[str, list[str]] = {}
    roots = []
    for name, seed in known.items():
        if seed.parent and seed.parent != name:
            children.setdefault(seed.parent, []).append(name)
        else:
            roots.append(name)
    roots += [name for name in children if name not in known]
    below = _spanned(children, roots, known)
    forks: dict[str, int] = {}
    for name in reversed(below):
        forks[name] = sum(1 + forks[each] for each in below[name])
    entries: list[dict[str, Any]] = []

    def walk(names: list[str], depth: int) -> None:
        ordered = sorted(names, key=lambda name: (-forks[name], name))
        for place, name in enumerate(ordered):
            if place == MAX_SIBLINGS or len(entries) >= MAX_ENTRIES:
                entries.append({"depth": depth, "more": sum(1 + forks[each] for each in ordered[place:])})
                return
            seed = known.get(name)
            labels = {} if seed is None else dict(seed.labels)
            entries.append({"depth": depth, "seed": name, "forks": forks[name], "labels": labels, "gone": seed is None})
            walk(below[name], depth + 1)

    walk(roots, 0)
    return entries


def _spanned(children: dict[str, list[str]], roots: list[str], known: Iterable[str]) -> dict[str, list[str]]:
    """Return the children of every seed, ancestors first, without circles.

    Addresses are used again, so a seed can state a parent at the address of its own descendant. Such a circle has no
    root: its first seed is added to ``roots``.
    """
    below: dict[str, list[str]] = {}
    for at_root, names in ((True, list(roots)), (False, list(known))):
        for root in names:
            if root in below:
                continue
            if not at_root:
                roots.append(root)
            pending = [root]
            while pending:
                name = pending.pop()
                below[name] = [each for each in children.get(name, ()) if each not in below]
                pending += below[name]
    return below
