"""One attempt for each engine of an order, and the engine whose lane a fork would take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Literal

from vllm_rfork.selftest import roles
from vllm_rfork.selftest.children import Child, ChildFailed, Late
from vllm_rfork.selftest.roles import Published, Result, Trial

#: The ways in which an attempt ends. ``refused``: before a byte moved, so that a fork would try the next lane.
Outcome = Literal["right", "wrong", "refused", "broke", "late"]


@dataclass(frozen=True)
class Attempt:
    """The end of one engine's attempt: its ``result`` if bytes arrived, else the reason as ``text``."""

    engine: str
    outcome: Outcome
    text: str = ""
    result: Result | None = None


def in_order(
    trials: Sequence[Trial], timeout_s: float, attempt: Callable[[Trial, float], Attempt], *, every: bool
) -> list[Attempt]:
    """Try the engines one after another until bytes have arrived; with ``every``, all of them.

    An engine that hangs leaves time for those that follow: each gets half of the time that is left, the last all of it.

    Args:
        attempt: gets a trial, whose ``timeout_s`` is its share, and the deadline of that share.
    """
    deadline = time.monotonic() + timeout_s
    ended: list[Attempt] = []
    for number, trial in enumerate(trials):
        left_s = max(0.0, deadline - time.monotonic())
        share_s = left_s if number == len(trials) - 1 else left_s / 2
        bounded = replace(trial, timeout_s=max(share_s, 0.1))
        ended.append(attempt(bounded, time.monotonic() + share_s))
        if ended[-1].result is not None and not every:
            break
    return ended


def on_this_machine(trial: Trial, deadline: float) -> Attempt:
    """Read from a seed that is another process of this machine."""

    def run(start: _Start) -> Result:
        seed, receiver = start("seed", roles.seed), start("receiver", roles.receiver)
        receiver.send(seed.receive(deadline))
        result: Result = receiver.receive(deadline)
        return result

    return _attempt(trial, run)


def from_elsewhere(trial: Trial, published: Published, deadline: float) -> Attempt:
    """Read from a seed that another host has published."""

    def run(start: _Start) -> Result:
        receiver = start("receiver", roles.receiver)
        receiver.send(published)
        result: Result = receiver.receive(deadline)
        return result

    return _attempt(trial, run)


#: Starts a child of a role.
_Start = Callable[[str, Callable[[Trial, Connection], None]], Child]


def _attempt(trial: Trial, run: Callable[[_Start], Result]) -> Attempt:
    """The attempt that ``run`` makes with children; they have ended when this returns."""
    with contextlib.ExitStack() as children:

        def start(role: str, work: Callable[[Trial, Connection], None]) -> Child:
            child = Child(role, work, trial)
            children.callback(child.end)
            return child

        try:
            result = run(start)
        except ChildFailed as error:
            return Attempt(trial.engine, "refused" if error.before_bytes else "broke", str(error))
        except Late as error:
            return Attempt(trial.engine, "late", f"{error} ({trial.timeout_s:.3g} s)")
    return Attempt(trial.engine, "wrong" if result.wrong else "right", result=result)
