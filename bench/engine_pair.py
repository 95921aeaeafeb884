"""A seed and receiver processes for one engine: started, ordered over a socket, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.standin.build import build, environment

ROOT = Path(__file__).parents[1]
#: Bound of one order, in seconds: the slowest engine reads 100,000 tensors in less.
ORDER_S = 180.0
#: Bound of ``open`` and ``connect``, in seconds.
CONNECT_S = 30.0


class Failed(Exception):
    """An order failed, or its process died; the text is for the table."""


class Unavailable(Failed):
    """The engine's package, or a library that it needs, is not installed."""


@dataclass(frozen=True)
class Setting:
    """The conditions of one engine's measurements.

    Attributes:
        device, seed_device: torch devices of receiver and seed.
        python: the interpreter that has the engine's package.
        environment: more variables of both processes.
        note: what a reader of the table has to know.
    """

    engine: str
    device: str
    seed_device: str
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def setting_of(engine: str, device_type: str, seed_device: str, device: str) -> Setting:
    """The interpreter and variables of an engine on this machine."""
    own = ROOT / f".venv-{engine}" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable
    if engine == "yuanrong" and device_type == "cpu":
        note = "the real wheel on the host stand-in, not an NPU"
        return Setting(engine, device, seed_device, python, environment(build()), note)
    return Setting(engine, device, seed_device, python)


class Worker:
    """A :mod:`bench.engine_worker` in a process of its own; every order has a deadline."""

    def __init__(self, setting: Setting) -> None:
        self._socket, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        with theirs:
            self.process = subprocess.Popen(
                [setting.python, "-m", "bench.engine_worker", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": path, **setting.environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._received = b""

    def send(self, order: str, **arguments: Any) -> None:
        """Send an order; :meth:`answer` returns its result."""
        try:
            self._socket.sendall(json.dumps({"order": order, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            raise Failed(f"{order}: the process is gone") from error

    def message(self, within_s: float) -> dict[str, Any]:
        """The next message.

        Raises:
            Failed: the process died, or sent nothing in time.
        """
        end = time.monotonic() + within_s
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise Failed(f"no answer within {within_s:g} s")
            with contextlib.suppress(ConnectionResetError):
                if more := self._socket.recv(1 << 20):
                    self._received += more
                    continue
            raise Failed(f"the process ended with status {self.process.wait(10)}")
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def answer(self, within_s: float = ORDER_S) -> Any:
        """The result of the last order.

        Raises:
            Unavailable: the engine is not installed.
            Failed: the engine refused or failed, or the process died.
        """
        message = self.message(within_s)
        if "unavailable" in message:
            raise Unavailable(message["unavailable"])
        if "failed" in message:
            raise Failed(message["failed"])
        return message["result"]

    def call(self, order: str, **arguments: Any) -> Any:
        """Send an order and return its result."""
        self.send(order, **arguments)
        return self.answer()

    def end(self) -> None:
        """End the process: close its socket, and kill it if that is not enough."""
        self._socket.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)


class Pair:
    """A seed and the receivers that read from it; a context manager that ends all of them."""

    def __init__(self, setting: Setting, count: int, nbytes: int) -> None:
        self.setting = setting
        self._count, self._nbytes = count, nbytes
        self._workers: list[Worker] = []
        self.opened: dict[str, float] = {}
        self.published: dict[str, Any] = {}

    def publish(self) -> Worker:
        """Start the seed and register its tensors."""
        seed = self._worker("seed", self.setting.seed_device)
        self.published = seed.call("register")
        return seed

    def receiver(self) -> tuple[Worker, dict[str, Any]]:
        """A new receiver, registered and connected; the seconds of both, and the lane."""
        receiver = self._worker("receiver", self.setting.device)
        registered = receiver.call("register")["seconds"]
        there = {"endpoint": self.published["endpoint"], "regions": self.published["regions"]}
        connected = receiver.call("connect", **there, timeout_s=CONNECT_S)
        return receiver, {"register_s": registered, "connect_s": connected["seconds"], "lane": connected["lane"]}

    def _worker(self, role: str, device: str) -> Worker:
        worker = Worker(self.setting)
        self._workers.append(worker)
        worker.call("allocate", device=device, count=self._count, nbytes=self._nbytes, filled=role == "seed")
        self.opened[role] = worker.call("open", name=self.setting.engine, device=device, timeout_s=CONNECT_S)
        return worker

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
