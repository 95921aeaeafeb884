"""Worker processes of the engine contract: started, called over a socket, killed and stopped by its tests."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pytest

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.errors import EngineError
from vllm_rfork.testing.engine_worker import as_json
from vllm_rfork.testing.fork_server import ForkedProcess, server

#: The folder that contains the package, for workers that run under another interpreter.
ROOT = Path(__file__).resolve().parents[2]
Pairs = Sequence[Sequence[int]]


class EngineSetup(Protocol):
    """The attributes of a contract class that the workers need."""

    engine: ClassVar[str]
    device: ClassVar[str]
    buffer: ClassVar[str]
    preload: ClassVar[tuple[str, ...]]

    def environment(self) -> Mapping[str, str]: ...
    def python(self) -> str: ...
    def config(self) -> EngineConfig: ...


class WorkerGone(Exception):
    """The process died instead of answering."""


class WorkerProcess:
    """A worker process; every call has a deadline, and a worker that misses it is killed."""

    def __init__(self, suite: EngineSetup) -> None:
        self.suite = suite
        self.elapsed_s = 0.0
        ours, theirs = socket.socketpair()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        environment = {**os.environ, "PYTHONPATH": path, **suite.environment()}
        self.process: subprocess.Popen[bytes] | ForkedProcess
        if suite.preload:
            command = (suite.python(), *suite.preload)
            environment.pop("PYTEST_CURRENT_TEST", None)  # one server for all tests
            self.process = server(command, tuple(sorted(environment.items()))).start(theirs)
        else:
            self.process = subprocess.Popen(
                [suite.python(), "-m", "vllm_rfork.testing.engine_worker", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        theirs.close()
        self._socket = ours
        self._buffer = b""

    # -- calls ---------------------------------------------------------------------------------------------------

    def send(self, op: str, **args: Any) -> None:
        try:
            self._socket.sendall(json.dumps({"op": op, "args": args}).encode() + b"\n")
        except OSError as error:
            raise WorkerGone(f"{op}: exit status {self.process.wait(60)}") from error

    def message(self, deadline_s: float) -> dict[str, Any]:
        end = time.monotonic() + deadline_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._socket], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.process.kill()
                pytest.fail(f"the worker did not answer within {deadline_s} s")
            try:
                got = self._socket.recv(1 << 20)
            except ConnectionResetError:
                got = b""
            if not got:
                raise WorkerGone(f"exit status {self.process.wait(60)}")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def result(self, deadline_s: float = 60.0) -> Any:
        message = self.message(deadline_s)
        self.elapsed_s = message.get("elapsed_s", 0.0)
        if facts := message.get("engine_error"):
            raise EngineError(side=facts.pop("side"), **facts)
        assert "other_error" not in message, f"not an EngineError: {message['other_error']}"
        return message["result"]

    def call(self, op: str, deadline_s: float = 60.0, **args: Any) -> Any:
        self.send(op, **args)
        return self.result(deadline_s)

    # -- the port, and memory ------------------------------------------------------------------------------------

    def alloc(self, nbytes: int, seed: int = 0) -> int:
        address: int = self.call("alloc", kind=self.suite.buffer, device=self.suite.device, nbytes=nbytes, seed=seed)
        return address

    def open(self) -> None:
        self.call("new", name=self.suite.engine)
        self.call("open", config=as_json(self.suite.config()))

    def lane_obstacle(self, endpoint: str) -> str | None:
        config = as_json(self.suite.config())
        found: str | None = self.call("lane_obstacle", name=self.suite.engine, endpoint=endpoint, config=config)
        return found

    def register(self, *regions: Sequence[int]) -> None:
        self.call("register", regions=regions)

    def endpoint(self) -> str:
        text: str = self.call("endpoint")
        return text

    def connect(self, endpoint: str, timeout_s: float = 10.0) -> None:
        self.call("connect", endpoint=endpoint, timeout_s=timeout_s)

    def disconnect(self, endpoint: str) -> None:
        self.call("disconnect", endpoint=endpoint)

    def read(self, endpoint: str, segments: Pairs, timeout_s: float = 30.0) -> None:
        self.call("read", endpoint=endpoint, segments=segments, timeout_s=timeout_s)

    def connect_and_read(self, endpoint: str, segments: Pairs) -> None:
        self.connect(endpoint, timeout_s=5.0)
        self.read(endpoint, segments, timeout_s=5.0)

    def digest(self, address: int, offset: int = 0, nbytes: int = -1) -> str:
        text: str = self.call("digest", address=address, offset=offset, nbytes=nbytes)
        return text

    def peek(self, address: int, offset: int, nbytes: int) -> bytes:
        return bytes.fromhex(self.call("peek", address=address, offset=offset, nbytes=nbytes))

    @property
    def registered_nbytes(self) -> int:
        nbytes: int = self.call("registered_nbytes")
        return nbytes

    def close(self) -> None:
        self.call("close")

    # -- the process ---------------------------------------------------------------------------------------------

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def hang_up(self) -> None:
        """Let the process end."""
        self._socket.close()

    def end(self) -> None:
        self.hang_up()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)


class Processes:
    """Starts workers for one test and ends them after it."""

    def __init__(self, suite: EngineSetup) -> None:
        self._suite = suite
        self._started: list[WorkerProcess] = []

    def start(self, *, opened: bool = True) -> WorkerProcess:
        worker = WorkerProcess(self._suite)
        self._started.append(worker)
        if opened:
            worker.open()
        return worker

    def two(self) -> tuple[WorkerProcess, WorkerProcess]:
        seed, receiver = self.start(opened=False), self.start(opened=False)
        seed.open()
        receiver.open()
        return seed, receiver

    def end(self) -> None:
        for worker in self._started:  # first all of them: some engines take a second to end
            worker.hang_up()
        for worker in self._started:
            worker.end()
