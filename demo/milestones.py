"""Reads from a server's log where its weights came from; the only place that knows those lines.

Only ranks' milestone lines are read, never progress or debug output. Must not guess: a log without such a line is
an error, not a zero.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from demo.processes import DemoError

FORKED = re.compile(r"RFork: forked (\d+) bytes .*? in ([\d.]+) s .*?from seed (\S+?:\d+:\d+)")
LOADED = re.compile(r"RFork: loaded (\d+) bytes .*?from storage in ([\d.]+) s")
ANNOUNCED = re.compile(r"RFork: seed (\S+?:\d+:\d+) announced")
FELL_BACK = re.compile(r"WARNING.*(RFork: .*)")


@dataclass(frozen=True)
class Weights:
    """Where a server's weights came from.

    Attributes:
        source: ``fork`` or ``storage``.
        seed: ip:port:rank of the seed that was read; ``None`` from storage.
        nbytes: bytes of weights.
        weights_s: seconds of the weights phase.
    """

    source: Literal["storage", "fork"]
    seed: str | None
    nbytes: int
    weights_s: float


def weights(log: str) -> Weights:
    """What the log of a server (one rank) says of its weights.

    Raises:
        DemoError: it says nothing, or more than one thing.
    """
    found = [Weights("fork", match[3], int(match[1]), float(match[2])) for match in FORKED.finditer(log)]
    found += [Weights("storage", None, int(match[1]), float(match[2])) for match in LOADED.finditer(log)]
    if len(found) != 1:
        raise DemoError(f"the log has {len(found)} lines that say where the weights came from, instead of one")
    return found[0]


def announced(log: str) -> str | None:
    """The ip:port:rank that the server announced to the planner; ``None`` while it has not."""
    match = ANNOUNCED.search(log)
    return match[1] if match else None


def warnings(log: str) -> list[str]:
    """RFork's warnings, in order: why a fork did not happen."""
    return [match[1] for match in FELL_BACK.finditer(log)]
