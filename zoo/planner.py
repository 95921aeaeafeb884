"""Planner processes for tests and the zoo: the mock planner of ``examples/`` and this package's own.

Must not import torch or vLLM.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[1]
_T = TypeVar("_T")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meeting_port() -> int:
    """Return a free TCP port of 127.0.0.1 outside the range from which the system assigns ports.

    For a port that is bound long after it was chosen: engines and seeds let the system assign theirs.
    """
    for port in random.SystemRandom().sample(range(20000, 32000), 100):  # forked processes share a seed
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("of a hundred ports between 20000 and 32000 none is free")


def eventually(condition: Callable[[], _T], what: str, timeout_s: float = 30.0) -> _T:
    """Wait until ``condition`` returns a true value, and return it.

    Raises:
        AssertionError: it is still false after ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.02)
    return value


class Planner:
    """A running mock planner; :meth:`stop` ends it."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(  # noqa: S603 - this checkout's own planner
            [sys.executable, *self._command(), "--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # What this process imports may come from there, too, where nothing is installed.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        eventually(self._up, "planner is up")

    def _command(self) -> list[str]:
        return [str(ROOT / "examples" / "rfork_planner.py")]

    def _up(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.snapshot() is not None)
        return False

    def snapshot(self) -> dict[str, Any]:
        """Return its whole state."""
        with urllib.request.urlopen(f"{self.url}/debug/snapshot", timeout=60) as answer:  # noqa: S310 - its own URL
            return dict(json.load(answer))

    def leases(self) -> int:
        """Return the number of leases."""
        return sum(len(seed["leases"]) for seed in self.snapshot()["seeds"])

    def seeds(self, model_url: str = "") -> list[str]:
        """Return ``ip:port:rank`` of every seed that is not absent; with ``model_url``, only of that model's."""
        known = [seed for seed in self.snapshot()["seeds"] if not seed.get("absent")]
        if model_url:
            known = [seed for seed in known if seed["key"].startswith(f"{model_url}$")]
        return [f"{seed['ip']}:{seed['port']}:{seed['rank']}" for seed in known]

    def stop(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """Stop it and start it again on its port, without its state."""
        self.stop()
        self._start()


class FleetPlanner(Planner):
    """This package's planner.

    The mock ignores fingerprints, and data parallel ranks may share a seed key. It also ignores presence connections
    and grants a killed seed for another minute.
    """

    def _command(self) -> list[str]:
        return ["-m", "vllm_rfork.cli.main", "planner"]

    def leases(self) -> int:
        """Return the number of leases."""
        return len(self.snapshot()["leases"])
