"""The demo's processes: started, waited for within bounds, and ended.

Every process gets a session of its own, so that a whole tree ends at once. Ctrl-C reaches only the demo, which then
ends them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

#: Interval between two checks of a condition, in seconds.
POLL_S = 0.2
TAIL_LINES = 30


class DemoError(Exception):
    """The demo could not run; the text says what did not happen and where the log is."""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(what: str, met: Callable[[], bool], deadline_s: float) -> float:
    """Wait for a condition; returns the seconds it took.

    Raises:
        DemoError: it was not met within ``deadline_s`` seconds.
    """
    start = time.monotonic()
    while not met():
        if time.monotonic() - start > deadline_s:
            raise DemoError(f"{what} did not happen within {deadline_s:.0f} s")
        time.sleep(POLL_S)
    return time.monotonic() - start


class Process:
    """One process with its own session and log file; a context manager that ends the whole tree.

    Args:
        name: its name in messages.
        command: the program and its arguments.
        env: the whole environment.
        log: where standard output and standard error go; overwritten.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._ended = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            self._popen = subprocess.Popen(
                command, env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def __enter__(self) -> Process:
        """Return itself; the process runs since construction."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the tree: with SIGTERM if the block succeeded, else with SIGKILL."""
        if kind is None:
            self.stop()
        else:
            self.kill()

    def text(self) -> str:
        """The output of the process so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def check_alive(self) -> None:
        """Check that the process still runs.

        Raises:
            DemoError: it has ended; the text contains the last lines of its log.
        """
        code = self._popen.poll()
        if code is not None:
            tail = "\n".join(self.text().splitlines()[-TAIL_LINES:])
            raise DemoError(f"{self.name} ended with {code}; the end of {self.log}:\n{tail}")

    def wait_until(self, what: str, met: Callable[[], bool], deadline_s: float) -> float:
        """As :func:`wait_until`, and fail at once if the process ends."""

        def met_and_alive() -> bool:
            self.check_alive()
            return met()

        try:
            return wait_until(f"{self.name}: {what}", met_and_alive, deadline_s)
        except DemoError as error:
            raise DemoError(f"{error} (log: {self.log})") from error

    def stop(self, grace_s: float = 20.0) -> None:
        """Send SIGTERM, and SIGKILL to the tree after ``grace_s`` seconds. Idempotent."""
        if self._ended:
            return
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace_s)
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL to the whole tree, as `kill -9` does. Idempotent.

        Raises:
            DemoError: a process survives it, as one that hangs in the kernel does.
        """
        if self._ended:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        # vLLM's own children get another parent; all have ended once the group has no member left.
        wait_until(f"the end of {self.name}'s processes", self._group_is_empty, deadline_s=30)
        self._popen.wait(timeout=30)
        self._ended = True

    def _group_is_empty(self) -> bool:
        return not any(_group_of(int(entry.name)) == self._popen.pid for entry in Path("/proc").glob("[0-9]*"))


def _group_of(pid: int) -> int:
    """The process group of a process that is not a zombie; 0 for one that is gone or dead."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, _parent, group = stat.rpartition(")")[2].split()[:3]
    return 0 if state == "Z" else int(group)
