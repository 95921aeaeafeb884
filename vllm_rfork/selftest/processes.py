"""A seed and a receiver process that transfer random bytes, and the report on them.

The parent only watches: a native engine that hangs does so in a child, which the parent kills at the deadline.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from vllm_rfork.selftest import roles
from vllm_rfork.selftest.roles import MOVES, Result, Trial

GOOD, WRONG_BYTES, FAILED, TOO_LATE = 0, 1, 3, 4
#: Meanings of the command's exit status; 2 is click's, for wrong usage.
CODES = {GOOD: "the bytes are right", WRONG_BYTES: "bytes are wrong", FAILED: "the engine failed", TOO_LATE: "too late"}

_END_S = 5.0
#: A fresh interpreter for each child: native engines do not survive a fork.
_SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Report:
    """The exit status (:data:`CODES`) and the lines to print."""

    code: int
    lines: list[str]


@dataclass(frozen=True)
class _Failure:
    """A child's last message: its error."""

    text: str


class _ChildFailed(Exception):
    """A child reported an error, or died."""


class _Deadline(Exception):
    """The run's time is up."""


def run(trial: Trial) -> Report:
    """Run ``trial``; returns within about ``trial.timeout_s`` seconds whatever the engine does."""
    deadline = time.monotonic() + trial.timeout_s
    title = f"selftest {trial.engine} on {trial.device}"
    with contextlib.ExitStack() as children:
        try:
            seed = _Child("seed", roles.seed, trial)
            children.callback(seed.end)
            receiver = _Child("receiver", roles.receiver, trial)
            children.callback(receiver.end)
            receiver.send(seed.receive(deadline))
            result: Result = receiver.receive(deadline)
        except _ChildFailed as error:
            return Report(FAILED, [f"{title}: {error}"])
        except _Deadline as error:
            return Report(TOO_LATE, [f"{title}: {error} ({trial.timeout_s:g} s)"])
    return _report(trial, result)


class _Child:
    """One child process and the pipe to it."""

    def __init__(self, role: str, work: Callable[[Trial, Connection], None], trial: Trial) -> None:
        self.role = role
        self._pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_child, args=(work, trial, theirs), name=f"rfork-selftest-{role}")
        self.process.start()
        theirs.close()

    def send(self, message: object) -> None:
        """Send one message to the child."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise _ChildFailed(f"the {self.role} is gone: {error}") from error

    def receive(self, deadline: float) -> Any:
        """The child's next message."""
        try:
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                raise _Deadline(f"the {self.role} was not done in time")
            message = self._pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(_END_S)
            status = self.process.exitcode
            raise _ChildFailed(f"the {self.role} ended with status {status} and without a message") from error
        if isinstance(message, _Failure):
            raise _ChildFailed(f"the {self.role} failed: {message.text}")
        return message

    def end(self) -> None:
        """Close the pipe, which ends the child, and kill the child if that is not enough."""
        self._pipe.close()
        self.process.join(_END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(_END_S)


def _child(work: Callable[[Trial, Connection], None], trial: Trial, parent: Connection) -> None:
    # The parent may close its end at any time, which ends the child and is not an error of its own.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), parent:
        try:
            work(trial, parent)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:  # noqa: BLE001 - the process's edge: the parent reports it
            parent.send(_Failure(f"{type(error).__name__}: {error}"))


def _report(trial: Trial, result: Result) -> Report:
    lines = [
        f"selftest {trial.engine}: {result.count} buffers, {result.nbytes} bytes, {trial.seed_device} -> {trial.device}"
    ]
    for name, seconds in result.seconds.items():
        speed = f"  {result.nbytes / seconds / 1e9:7.2f} GB/s" if name in MOVES and seconds > 0 else ""
        lines.append(f"  {name:<28}{seconds:9.4f} s{speed}")
    if result.wrong:
        shown = ", ".join(map(str, result.wrong[:10]))
        lines.append(f"FAILED: {len(result.wrong)} of {result.count} buffers differ from the seed's digests: {shown}")
        return Report(WRONG_BYTES, lines)
    lines.append("every digest is right")
    return Report(GOOD, lines)
