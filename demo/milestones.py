"""Parser of the milestone lines in a server's log, which say where its weights came from.

It reads milestone lines of ranks only, never progress or debug output. A log without such a line is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from demo.processes import DemoError

FORKED = re.compile(r"RFork: forked (\d+) bytes .*? in ([\d.]+) s .*?from seed (\S+?:\d+:\d+)")
LOADED = re.compile(r"RFork: loaded (\d+) bytes .*?from storage in ([\d.]+) s .*?load_format=(\w+)")
ANNOUNCED = re.compile(r"RFork: seed (\S+?:\d+:\d+) announced")
FELL_BACK = re.compile(r"WARNING.*(RFork: .*)")


@dataclass(frozen=True)
class Weights:
    """The origin of a server's weights.

    Attributes:
        source: ``fork`` or ``storage``.
        seed: ip:port:rank of the seed that was read; ``None`` from storage.
        nbytes: bytes of weights.
        weights_s: seconds of the weights phase.
        load_format: vLLM's load format that read the files; ``None`` for a fork.
    """

    source: Literal["storage", "fork"]
    seed: str | None
    nbytes: int
    weights_s: float
    load_format: str | None = None


def weights(log: str) -> Weights:
    """The origin of a server's weights (one rank), from its log.

    Raises:
        DemoError: the log has no such line, or more than one.
    """
    found = [Weights("fork", match[3], int(match[1]), float(match[2])) for match in FORKED.finditer(log)]
    found += [Weights("storage", None, int(match[1]), float(match[2]), match[3]) for match in LOADED.finditer(log)]
    if len(found) != 1:
        raise DemoError(f"the log has {len(found)} lines that say where the weights came from, instead of one")
    return found[0]


def announced(log: str) -> str | None:
    """The ip:port:rank that the server announced to the planner; ``None`` before that."""
    match = ANNOUNCED.search(log)
    return match[1] if match else None


def warnings(log: str) -> list[str]:
    """RFork's warnings, in order, with the reasons of failed forks."""
    return [match[1] for match in FELL_BACK.finditer(log)]
