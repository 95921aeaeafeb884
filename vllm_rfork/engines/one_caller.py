"""One caller at a time for an engine, and the calls that it refuses because of its state."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from vllm_rfork.engines.refusals import busy, given_up, not_open, still_called

T = TypeVar("T")


class OneCaller:
    """The lock of one engine object, and what it knows about its calls.

    Args:
        engine: the engine's name.

    Attributes:
        timeout_s: ``EngineConfig.timeout_s``: how long a caller waits for its turn if its call has no bound.
        closing: ``close`` has begun, so other calls end soon or are refused.
        stuck: the reason why an earlier read is in flight for good; empty if none is.
    """

    def __init__(self, engine: str) -> None:
        self.timeout_s = 30.0
        self.closing = False
        self.stuck = ""
        self._engine = engine
        self._lock = threading.Lock()

    def opened(self, timeout_s: float) -> None:
        """Forget an earlier life of the engine."""
        self.timeout_s, self.closing, self.stuck = timeout_s, False, ""

    @contextmanager
    def turn(
        self, operation: str, timeout_s: float = 0.0, *, in_flight: bool = False, retry_elsewhere: bool = True
    ) -> Iterator[None]:
        """Keep other callers out of the block.

        Raises:
            EngineError: another call does not return within ``timeout_s`` seconds (0: :attr:`timeout_s`); it has the
                given properties.
        """
        if not self._lock.acquire(timeout=timeout_s or self.timeout_s):
            raise busy(self._engine, operation, in_flight=in_flight, retry_elsewhere=retry_elsewhere)
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def last_turn(self) -> Iterator[None]:
        """Refuse other calls from now on, and keep their callers out of the block, which closes the engine.

        Raises:
            EngineError: a native call does not return within :attr:`timeout_s` (``in_flight``).
        """
        self.closing = True
        if not self._lock.acquire(timeout=self.timeout_s):
            raise still_called(self._engine)
        try:
            yield
        finally:
            self._lock.release()

    def usable(self, operation: str, native: T | None) -> T:
        """``native``, the engine's native part; None if it is not open.

        Raises:
            EngineError: it is not open, is closing, or is stuck in a read.
        """
        if native is None or self.closing:
            raise not_open(self._engine, operation)
        if self.stuck:
            raise given_up(self._engine, operation, self.stuck)
        return native
