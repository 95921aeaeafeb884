"""The processes of the self-test: one for each seed and receiver.

The parent only watches: a native engine that crashes or hangs does so in a child, which the parent kills at the
deadline.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from vllm_rfork.errors import EngineError
from vllm_rfork.selftest.roles import Trial

_END_S = 5.0
#: A fresh interpreter for each child: native engines do not survive a fork.
_SPAWN = multiprocessing.get_context("spawn")
#: Operations that precede the first byte: a fork whose engine fails in one of them tries the next lane.
_BEFORE_BYTES = frozenset({"open", "register", "connect"})


class ChildFailed(Exception):
    """A child reported an error, or died. ``before_bytes``: an engine refused before it moved a byte."""

    def __init__(self, text: str, *, before_bytes: bool = False) -> None:
        super().__init__(text)
        self.before_bytes = before_bytes


class Late(Exception):
    """A child's message did not arrive in time."""


@dataclass(frozen=True)
class _Failure:
    """A child's last message: its error."""

    text: str
    before_bytes: bool


class Child:
    """One child process and the pipe to it."""

    def __init__(self, role: str, work: Callable[[Trial, Connection], None], trial: Trial) -> None:
        self.role = role
        self._pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_child, args=(work, trial, theirs), name=f"rfork-selftest-{role}")
        self.process.start()
        theirs.close()

    def send(self, message: object) -> None:
        """Send one message to the child. Raises ChildFailed."""
        try:
            self._pipe.send(message)
        except OSError as error:
            raise ChildFailed(f"the {self.role} is gone: {error}") from error

    def receive(self, deadline: float) -> Any:
        """The child's next message.

        Raises:
            ChildFailed: it failed or died.
            Late: no message until ``deadline``, a time of ``time.monotonic``.
        """
        try:
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                raise Late(f"the {self.role} was not done in time")
            message = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ChildFailed(f"the {self.role} {self.ending} and without a message") from error
        if isinstance(message, _Failure):
            raise ChildFailed(f"{self.role}: {message.text}", before_bytes=message.before_bytes)
        return message

    @property
    def ending(self) -> str:
        """The end of the process, for a message; waits for it a few seconds."""
        self.process.join(_END_S)
        return f"ended with status {self.process.exitcode}"

    def end(self) -> None:
        """Close the pipe, which ends the child, and kill the child if that is not enough."""
        self._pipe.close()
        self.process.join(_END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(_END_S)


def _child(work: Callable[[Trial, Connection], None], trial: Trial, parent: Connection) -> None:
    # A terminal sends Ctrl-C to the children as well; the parent ends them in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent may close its end at any time, which ends the child and is not an error of its own.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), parent:
        try:
            work(trial, parent)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except EngineError as error:
            parent.send(_Failure(str(error), error.operation in _BEFORE_BYTES))
        except Exception as error:  # noqa: BLE001 - the process's edge: the parent reports it
            parent.send(_Failure(f"{type(error).__name__}: {error}", False))
