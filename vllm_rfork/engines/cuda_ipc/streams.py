"""Copies on CUDA streams of the engine's own, and the wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from vllm_rfork.engines.cuda_ipc.driver import NAME, Driver
from vllm_rfork.errors import EngineError

#: Copies of one stream follow each other with a gap of some microseconds; those of several fill each other's gaps. On
#: two H200, 14 GiB in 2000 tensors read at 257 GB/s with one.
STREAMS = 4
#: Between two looks at the streams, in seconds. A batch of 2 GiB takes 5 ms.
_PAUSE_S = 0.00005


class CopyStreams:
    """The streams of one open engine; the driver's context must be current.

    Args:
        stopped: returns the reason to give a wait up, if there is one.
    """

    def __init__(self, driver: Driver, stopped: Callable[[], str | None]) -> None:
        self._driver = driver
        self._stopped = stopped
        self._streams = tuple(driver.new_stream() for _ in range(STREAMS))

    def queue(self, copies: Iterable[tuple[int, int, int]]) -> None:
        """Queue copies, each a destination, a source and a number of bytes, on all streams in turn.

        Raises:
            EngineError: the driver refused one; those before it are queued.
        """
        for number, (to, source, nbytes) in enumerate(copies):
            self._driver.copy(self._streams[number % STREAMS], to, source, nbytes)

    def wait(self, deadline: float, operation: str) -> None:
        """Wait until every queued copy is done.

        Raises:
            EngineError: a copy failed; or they take too long, then with ``in_flight``.
        """
        while not self._are_idle():
            why = self._stopped()
            if why is None and time.monotonic() >= deadline:
                why = "the copies did not end in time"
            if why is not None:
                raise EngineError(
                    NAME, operation, why, code="timeout", in_flight=True, retry_elsewhere=True, side="unknown"
                )
            time.sleep(_PAUSE_S)

    def drain(self, timeout_s: float) -> None:
        """Wait for the last copy before the engine closes.

        Raises:
            EngineError: it does not end (``in_flight``).
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if self._are_idle():
                    return
            except EngineError:  # a copy failed: the context is lost, and nothing in it writes any more
                return
            if time.monotonic() >= deadline:
                raise EngineError(NAME, "close", "the copies of a read do not end", code="timeout", in_flight=True)
            time.sleep(_PAUSE_S)

    def destroy(self) -> None:
        """Destroy the streams, which must be empty."""
        for stream in self._streams:
            self._driver.destroy_stream(stream)

    def _are_idle(self) -> bool:
        return all(self._driver.is_idle(stream) for stream in self._streams)
