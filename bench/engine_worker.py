"""A process with one engine and the tensors of a model, ordered by :mod:`bench.engines` over a socket.

Run as ``python -m bench.engine_worker FD``; one JSON object a line in either direction. It needs the package's light
dependencies and the engine's own, and torch on a GPU only, so it runs under the interpreter of any engine.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

from bench.engine_memory import Tensors, device_nbytes, peak_nbytes, raw_source, tensors
from vllm_rfork.engines.base import EngineConfig, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, EngineUnavailable
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment, batches

#: Bound of one native read, in seconds.
READ_S = 60.0


class Worker:
    """One method per order; arguments and results are JSON."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._engine: TransferEngine | None = None
        self._memory: Tensors | None = None
        self._segments: list[Segment] = []
        self._endpoint = ""
        self._before = (0, 0)

    def allocate(self, device: str, count: int, nbytes: int, filled: bool) -> None:
        """Make ``count`` tensors of ``nbytes`` together; a receiver's are not ``filled``, and on a CPU not touched."""
        self._memory = tensors(device, count, nbytes)
        if filled:
            self._memory.fill()
        self._before = peak_nbytes() + self._memory.untouched_nbytes, device_nbytes(device)

    def open(self, name: str, device: str, timeout_s: float) -> float:
        """Seconds to import and open the engine."""
        started = time.perf_counter()
        self._engine = engine_class(name)()
        self._engine.open(EngineConfig(device=device, host="127.0.0.1", timeout_s=timeout_s))
        return time.perf_counter() - started

    def register(self) -> dict[str, Any]:
        """Seconds to register all tensors and to describe them; the endpoint and the regions."""
        regions = self.memory.regions()
        started = time.perf_counter()
        self.engine.register([Region(*region) for region in regions])
        endpoint = self.engine.endpoint
        return {"seconds": time.perf_counter() - started, "endpoint": endpoint, "regions": regions}

    def connect(self, endpoint: str, regions: list[list[int]], timeout_s: float) -> dict[str, Any]:
        """Seconds to connect, and the lane."""
        mine = self.memory.regions()
        self._segments = [Segment(here[0], there[0], here[1]) for here, there in zip(mine, regions, strict=True)]
        self._endpoint = endpoint
        started = time.perf_counter()
        self.engine.connect(endpoint, timeout_s)
        return {"seconds": time.perf_counter() - started, "lane": self.engine.lane(endpoint)}

    def read(self) -> dict[str, float]:
        """Wall and processor seconds to read everything once, in batches as a fork reads."""
        limits = self.engine.limits_for(self._endpoint)
        cut = batches(self._segments, max_nbytes=limits.max_batch_nbytes, max_items=limits.max_batch_items)
        prepared = list(cut)
        started, cpu_s = time.perf_counter(), cpu_seconds()
        for batch in prepared:
            self.engine.read(self._endpoint, batch, READ_S)
        return {"seconds": time.perf_counter() - started, "cpu_s": cpu_seconds() - cpu_s}

    def read_on(self, seconds: float) -> dict[str, Any]:
        """Read again and again for ``seconds``; reports when the first pass is done, returns the number of passes."""
        end = time.monotonic() + seconds
        passes = 0
        while time.monotonic() < end:
            self.read()
            passes += 1
            if passes == 1:
                self.send({"event": "reading"})
        return {"passes": passes, "right": self.memory.is_right()}

    def is_right(self) -> bool:
        """Compare every byte with what a seed has."""
        return self.memory.is_right()

    def usage(self, device: str) -> dict[str, float]:
        """Processor seconds since the start; bytes above the tensors: resident at the peak, and of the device now."""
        host, on_device = self._before
        return {
            "cpu_s": cpu_seconds(),
            "peak_nbytes": max(0, peak_nbytes() - host),
            "device_nbytes": max(0, device_nbytes(device) - on_device),
        }

    def raw_source(self, device: str, nbytes: int) -> Any:
        """Make the source of the raw copy; returns what :meth:`raw` needs to reach it."""
        return raw_source(device, nbytes)

    def raw(self, source: Any) -> dict[str, float]:
        """GB/s of one raw copy of the same number of bytes, by the kind of target memory."""
        return self.memory.raw_rates(source)

    def close(self) -> None:
        """Close the engine."""
        self.engine.close()

    @property
    def engine(self) -> TransferEngine:
        """The engine of ``open``."""
        if self._engine is None:
            raise RuntimeError("there is no engine yet")
        return self._engine

    @property
    def memory(self) -> Tensors:
        """The tensors of ``allocate``."""
        if self._memory is None:
            raise RuntimeError("there are no tensors yet")
        return self._memory

    def send(self, message: dict[str, Any]) -> None:
        """Send one message to the parent."""
        self._stream.write(json.dumps(message).encode() + b"\n")
        self._stream.flush()

    def serve(self) -> None:
        """Execute orders until the parent closes the socket."""
        for line in self._stream:
            request = json.loads(line)
            try:
                answer = {"result": getattr(self, request["order"])(**request["arguments"])}
            except EngineUnavailable as error:
                answer = {"unavailable": str(error)}
            except EngineError as error:
                answer = {"failed": str(error), "in_flight": error.in_flight}
            self.send(answer)


def cpu_seconds() -> float:
    """Processor seconds of all threads of this process."""
    times = os.times()
    return times.user + times.system


def main() -> None:
    """Serve the socket whose descriptor is the first argument."""
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        Worker(connection.makefile("rwb")).serve()
    # Native threads that an engine failed to end must not keep the process alive.
    timer = threading.Timer(5.0, os._exit, (3,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
