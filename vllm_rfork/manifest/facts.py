"""The facts behind a fingerprint as short texts, and the differences between two workers' facts.

A fingerprint does not show in what two workers differ. So a seed serves its facts, and a receiver that finds only
seeds with other fingerprints under its key compares them with its own and logs the differences. These texts decide
nothing: long values are cut, and only the fingerprint counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_rfork.logs.quoting import printable

#: Facts of one worker; a larger configuration is divided less finely.
MAX_FACTS = 2_000
#: Characters of one value and of one name. A longer value ends in a digest, so that differences remain visible.
MAX_VALUE = 120
MAX_NAME = 160
#: Differences in one line.
SHOWN = 10
ABSENT = "not set"
#: Names whose values are replaced by a digest: options and variables may contain secrets.
_PRIVATE = re.compile(r"(?:token|secret|passwo?r?d|credentials?|api_?key)(?:\Z|\"\s*:)", re.IGNORECASE)


def short_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """``facts`` (nested plain data) as path → short text: ``{"options.model.dtype": "bfloat16", ...}``.

    At most :data:`MAX_FACTS` entries. Lists are one value each.
    """
    for depth in (8, 3, 2, 1):
        short = {printable(path, MAX_NAME): _short(path, value) for path, value in _leaves("", facts, depth)}
        if len(short) <= MAX_FACTS:
            return short
    return dict(list(short.items())[:MAX_FACTS])


def _leaves(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value and depth:
        for name in sorted(value, key=str):
            yield from _leaves(f"{path}.{name}" if path else str(name), value[name], depth - 1)
    else:
        yield path, value


def _short(path: str, value: Any) -> str:
    # A configuration contains "torch.bfloat16"; readers expect bfloat16.
    text = value.removeprefix("torch.") if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    if _PRIVATE.search(path) or (not isinstance(value, str) and _PRIVATE.search(text)):
        return f"#{digest}"
    if len(text) > MAX_VALUE:
        return f"{printable(text[: MAX_VALUE - 20], MAX_VALUE)}… #{digest}"
    return printable(text, MAX_VALUE)


def differences(own: Mapping[str, str], others: Sequence[tuple[Mapping[str, str], int]]) -> list[str]:
    """Differences between ``own`` facts and those of others: ``dtype: bfloat16 here, float16 on 3 seeds``.

    Args:
        others: for each other fingerprint, the facts and the number of seeds with it.

    A fact is named by the last part of its path if no other differing fact has the same last part.
    """
    texts = []
    for name, path in _differing(own, [facts for facts, _ in others]):
        here = own.get(path, ABSENT)
        seeds: dict[str, int] = {}
        for facts, count in others:
            there = facts.get(path, ABSENT)
            if there != here:
                seeds[there] = seeds.get(there, 0) + count
        elsewhere = ", ".join(f"{value} on {count} seed{'' if count == 1 else 's'}" for value, count in seeds.items())
        texts.append(f"{name}: {here} here, {elsewhere}")
    return texts


class Difference(NamedTuple):
    """A fact that two workers have with different values."""

    fact: str
    here: str
    there: str

    def __str__(self) -> str:
        return f"{self.fact}: {self.here} here, {self.there} there"


def differences_to(own: Mapping[str, str], theirs: Mapping[str, str]) -> list[Difference]:
    """Differences between ``own`` facts and those of one other worker, named as by :func:`differences`."""
    return [
        Difference(name, own.get(path, ABSENT), theirs.get(path, ABSENT)) for name, path in _differing(own, [theirs])
    ]


def _differing(own: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Name and path of each fact that is not the same everywhere."""
    paths = [
        path
        for path in dict.fromkeys([*own, *(path for facts in others for path in facts)])
        if any(facts.get(path, ABSENT) != own.get(path, ABSENT) for facts in others)
    ]
    ends = [path.rpartition(".")[2] for path in paths]
    return [(end if ends.count(end) == 1 else path, path) for path, end in zip(paths, ends, strict=True)]


def described(texts: Sequence[str]) -> str:
    """``texts`` in one line; the first :data:`SHOWN` of them."""
    more = len(texts) - SHOWN
    return "; ".join(texts[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
