"""A process with one engine and some memory, controlled by the contract suite over a socket.

Run as ``python -m vllm_rfork.testing.engine_worker FD``; one JSON object a line in either direction. It runs under any
interpreter that has the package's light dependencies and the engine's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import random
import socket
import sys
import threading
import time
import traceback
from typing import Any

from vllm_rfork.engines.base import EngineConfig, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, RForkError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.selftest.buffers import Buffer


class Worker:
    """One method per command; arguments and results are JSON."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.engine: TransferEngine | None = None
        self.buffers: dict[int, Buffer] = {}
        self.repeated: dict[str, str] = {}

    def new(self, name: str) -> None:
        self.engine = engine_class(name)()

    def alloc(self, kind: str, device: str, nbytes: int, seed: int) -> int:
        """A buffer of class ``kind`` (``module:class``) whose bytes are :func:`pattern` of ``seed`` (0: zeros)."""
        module, _, name = kind.partition(":")
        buffer: Buffer = getattr(importlib.import_module(module), name)(device, nbytes)
        self.buffers[buffer.address] = buffer
        if seed:
            buffer.write(0, pattern(seed, nbytes))
        return buffer.address

    def fill(self, address: int, seed: int) -> None:
        buffer = self.buffers[address]
        buffer.write(0, pattern(seed, buffer.nbytes))

    def free(self, address: int) -> None:
        self.buffers.pop(address).close()

    def digest(self, address: int, offset: int = 0, nbytes: int = -1) -> str:
        buffer = self.buffers[address]
        taken = buffer.nbytes - offset if nbytes < 0 else nbytes
        return hashlib.blake2b(buffer.read(offset, taken)).hexdigest()

    def peek(self, address: int, offset: int, nbytes: int) -> str:
        return self.buffers[address].read(offset, nbytes).hex()

    def open(self, config: dict[str, Any]) -> None:
        self._engine().open(EngineConfig(**config))

    def endpoint(self) -> str:
        return self._engine().endpoint

    def register(self, regions: list[list[int]]) -> None:
        self._engine().register([Region(*region) for region in regions])

    def registered_nbytes(self) -> int:
        return self._engine().registered_nbytes

    def lane_obstacle(self, name: str, endpoint: str, config: dict[str, Any]) -> str | None:
        return engine_class(name).lane_obstacle(endpoint, EngineConfig(**config))

    def present_lease(self, lease: str) -> None:
        self._engine().present_lease(lease)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        self._engine().connect(endpoint, timeout_s)

    def disconnect(self, endpoint: str) -> None:
        self._engine().disconnect(endpoint)

    def read(self, endpoint: str, segments: list[list[int]], timeout_s: float) -> None:
        self._engine().read(endpoint, [Segment(*segment) for segment in segments], timeout_s)

    def repeat(self, piece: str, nbytes: int) -> str:
        """Make an endpoint of ``nbytes`` here, because it is too long for the stream; returns its name."""
        name = f"endpoint {len(self.repeated)}"
        self.repeated[name] = (piece * (nbytes // len(piece) + 1))[:nbytes]
        return name

    def attempt(self, endpoint: str, segment: list[int], timeout_s: float) -> None:
        """Connect, read one segment and disconnect; ``endpoint`` may be a name from :meth:`repeat`."""
        text = self.repeated.get(endpoint, endpoint)
        try:
            self.connect(text, timeout_s)
            self.read(text, [segment], timeout_s)
        finally:
            self.disconnect(text)

    def in_threads(self, calls: list[dict[str, Any]]) -> None:
        """Run commands one after another, each on a thread of its own."""
        for call in calls:
            failures: list[BaseException] = []
            thread = threading.Thread(target=self._keep_failure, args=(call, failures))
            thread.start()
            thread.join()
            if failures:
                raise failures[0]

    def _keep_failure(self, call: dict[str, Any], failures: list[BaseException]) -> None:
        try:
            getattr(self, call["op"])(**call["args"])
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            failures.append(error)

    def read_loop(self, endpoint: str, segments: list[list[int]], timeout_s: float, seconds: float) -> int:
        """Read over and over for at most ``seconds``; reports once the first read is done, returns their number."""
        end = time.monotonic() + seconds
        count = 0
        while time.monotonic() < end:
            self.read(endpoint, segments, timeout_s)
            count += 1
            if count == 1:
                self.send({"event": "reading"})
        return count

    def close(self) -> None:
        self._engine().close()

    def cpu_s(self, seconds: float) -> float:
        """Processor seconds that this process spends while it has nothing to do for ``seconds``."""
        before = time.process_time()
        time.sleep(seconds)
        return time.process_time() - before

    def ticks(self) -> int:
        """Number of native and Python threads of the process."""
        return len(os.listdir("/proc/self/task"))

    def ping(self) -> str:
        return "pong"

    def _engine(self) -> TransferEngine:
        if self.engine is None:
            raise RuntimeError("no engine yet")
        return self.engine

    def send(self, message: dict[str, Any]) -> None:
        self.stream.write(json.dumps(message).encode() + b"\n")
        self.stream.flush()

    def serve(self) -> None:
        for line in self.stream:
            request = json.loads(line)
            began = time.monotonic()
            try:
                answer = {"result": getattr(self, request["op"])(**request["args"])}
            except EngineError as error:
                kept = ("engine", "operation", "text", "code", "retry_elsewhere", "in_flight", "side")
                answer = {"engine_error": {name: getattr(error, name) for name in kept}}
            except (RForkError, Exception) as error:  # noqa: BLE001 - whatever it is, the test has to see it
                answer = {"other_error": f"{type(error).__name__}: {error}\n{traceback.format_exc()}"}
            self.send({**answer, "elapsed_s": time.monotonic() - began})


def pattern(seed: int, nbytes: int) -> bytes:
    """Random bytes that depend on ``seed`` alone."""
    return random.Random(seed).randbytes(nbytes)


def as_json(config: EngineConfig) -> dict[str, Any]:
    """``config`` as the ``open`` command takes it."""
    return {**dataclasses.asdict(config), "options": dict(config.options)}


def main(descriptor: int) -> None:
    """Serve the socket ``descriptor`` until the suite closes it."""
    with socket.socket(fileno=descriptor) as connection:
        stream = connection.makefile("rwb")
        Worker(stream).serve()
    # Native threads that an engine failed to end must not keep the process alive: the suite has its answers.
    timer = threading.Timer(5.0, os._exit, (3,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main(int(sys.argv[1]))
