"""The processes of the self-test: one for each seed and receiver.

The parent only watches: a native engine that crashes or hangs does so in a child, which the parent kills at the
deadline. Native libraries log what no operator needs, so a child's output goes to a file, and its end is part of the
error if the child fails.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from tempfile import _TemporaryFileWrapper
from typing import Any

from vllm_rfork.errors import EngineError
from vllm_rfork.logs.quoting import printable
from vllm_rfork.selftest.roles import Trial

_END_S = 5.0
#: The end of a failed child's output that is shown.
_OUTPUT_NBYTES, _OUTPUT_LINES = 2000, 5
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
    """One child process, the pipe to it, and its output, unless ``trial.native_log`` leaves that on the terminal."""

    def __init__(self, role: str, work: Callable[[Trial, Connection], None], trial: Trial) -> None:
        self.role = role
        self._pipe, theirs = _SPAWN.Pipe()
        self._output = None if trial.native_log else _output_file()
        output = "" if self._output is None else self._output.name
        self.process = _SPAWN.Process(target=_child, args=(work, trial, theirs, output), name=f"rfork-selftest-{role}")
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
            raise ChildFailed(f"the {self.role} {self.ending}, without a message") from error
        if isinstance(message, _Failure):
            last = "" if message.before_bytes else self._last_output()
            raise ChildFailed(f"{self.role}: {message.text}{last}", before_bytes=message.before_bytes)
        return message

    @property
    def ending(self) -> str:
        """The end of the process and of its output, for a message; waits for it a few seconds."""
        self.process.join(_END_S)
        return f"ended with status {self.process.exitcode}{self._last_output()}"

    def _last_output(self) -> str:
        """The last lines of the child's output, as a clause; empty if there is none."""
        if self._output is None:
            return ""
        self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, self._output.tell() - _OUTPUT_NBYTES))
        lines = self._output.read().decode("utf-8", "replace").splitlines()[-_OUTPUT_LINES:]
        return f" (its last output: {printable(' | '.join(lines), _OUTPUT_NBYTES)})" if lines else ""

    def end(self) -> None:
        """Close the pipe, which ends the child, and kill the child if that is not enough."""
        self._pipe.close()
        self.process.join(_END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(_END_S)
        if self._output is not None:
            self._output.close()


def _output_file() -> _TemporaryFileWrapper[bytes] | None:
    """A file for a child's output; None if this container has no writable folder, and so the output is not kept."""
    try:
        return tempfile.NamedTemporaryFile(prefix="rfork-selftest-")
    except OSError:
        return None


def _child(work: Callable[[Trial, Connection], None], trial: Trial, parent: Connection, output: str) -> None:
    if output:
        _redirect(output)
    # A terminal sends Ctrl-C to the children as well; the parent ends them in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent may close its end at any time, which ends the child and is not an error of its own.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError), parent:
        try:
            work(trial, parent)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except EngineError as error:
            text = str(error).removeprefix(f"engine {error.engine}: ")  # the report begins with the engine
            parent.send(_Failure(text, error.operation in _BEFORE_BYTES))
        except Exception as error:  # noqa: BLE001 - the process's edge: the parent reports it
            parent.send(_Failure(f"{type(error).__name__}: {error}", False))


def _redirect(output: str) -> None:
    """Send this process's output, native libraries' included, to the file ``output``."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
