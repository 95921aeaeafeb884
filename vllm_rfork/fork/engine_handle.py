"""One transfer engine of a worker: opened in the background, registered, handed to a seed, closed, or quarantined."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vllm_rfork.engines.base import EngineConfig, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, ForkError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import Region
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline, start_on_thread

logger = worker_logger(__name__)

T = TypeVar("T")

#: How long past its own bound an engine's call may take before it is given up, in seconds.
GRACE_S = 1.0

#: Engines that could not be closed, with the memory that they may still write to or serve. Kept until the process ends.
_quarantine: list[tuple[TransferEngine, Any]] = []


class EngineHangs(EngineError):
    """A call did not return: its thread and the buffers belong to the engine until the process ends."""


class EngineHandle:
    """One engine of a worker, opened on a thread of its own when it is first needed.

    Attributes:
        opening_s: seconds that opening took; 0 while it is not open.
        doubtful: its last call failed, and not for the peer, so it may refuse all others: a seed needs a new one.
    """

    def __init__(self, name: str, config: EngineConfig) -> None:
        self.name = name
        self.opening_s = 0.0
        self.doubtful = False
        self._config = config
        self._opening: concurrent.futures.Future[TransferEngine] | None = None
        self._began_at = 0.0
        self._registered_memory: Any = None  # keeps it alive until the engine is closed
        self._spent = False  # a seed needs another one

    def start_opening(self) -> concurrent.futures.Future[TransferEngine]:
        """Begin to open the engine in the background, unless that has begun; returns the engine to come."""
        if self._opening is None:
            self._began_at = time.monotonic()
            self._opening = start_on_thread(self._open, "rfork-engine")
        return self._opening

    def _open(self) -> TransferEngine:
        started = time.perf_counter()
        try:
            engine = engine_class(self.name)()
            engine.open(self._config)
        except EngineError:
            raise
        except BaseException as error:
            text = f"unexpected {type(error).__name__}: {error}"
            raise EngineError(self.name, "open", text) from error
        self.opening_s = time.perf_counter() - started
        return engine

    def opened(self, timeout_s: float | None = None) -> TransferEngine:
        """The open engine; opens it if needed, and waits for it.

        Args:
            timeout_s: bound of the wait; None for the engine's own bound, which counts from the beginning of opening.

        Raises:
            EngineError: it could not be opened, or not in time; or it has been given up, or now belongs to a seed.
        """
        opening = self.start_opening()
        bound_s = self._config.timeout_s + GRACE_S
        left_s = max(0.0, self._began_at + bound_s - time.monotonic())
        try:
            return opening.result(left_s if timeout_s is None else min(left_s, timeout_s))
        except concurrent.futures.TimeoutError as error:
            waited_s = time.monotonic() - self._began_at
            raise EngineError(self.name, "open", f"not open after {waited_s:.1f} s") from error

    def failure(self) -> EngineError | None:
        """The error with which opening has ended; None if it succeeded, is under way, or has not begun."""
        error = None if self._opening is None or self.is_opening() else self._opening.exception()
        return error if isinstance(error, EngineError) else None

    def is_opening(self) -> bool:
        """Opening has begun and not ended."""
        return self._opening is not None and not self._opening.done()

    def register(self, regions: Sequence[Region], memory: Any, timeout_s: float) -> None:
        """Register ``regions`` if nothing is registered yet, and keep ``memory`` until the engine is closed.

        Raises:
            EngineError: it failed, or did not return within ``timeout_s`` seconds.
        """
        engine = self.opened()
        if engine.registered_nbytes:
            return
        call_engine(engine, "register", timeout_s, lambda: engine.register(regions))
        self._registered_memory = memory

    def renew(self) -> None:
        """Begin to open the engine for a seed: a new one after a discard, a close, a hand-over or a failure."""
        if self._spent or self.doubtful:
            self.close()
            self._opening, self._spent, self.doubtful = None, False, False
        self.start_opening()

    def hand_over(self, timeout_s: float) -> TransferEngine:
        """The engine for the seed that this worker becomes. An engine that is not open in time is closed.

        Raises:
            EngineError: it cannot be opened, or not within ``timeout_s`` seconds.
        """
        try:
            engine = self.opened(timeout_s)
        except EngineError:
            self.close()
            raise
        self._lose("the engine now belongs to the seed")
        return engine

    def close_if_registered(self) -> None:
        """Close the engine if it has registrations, so that the registered memory may be freed."""
        if self._registered_memory is not None:
            self.close()

    def discard(self) -> None:
        """Record that a seed needs a new engine, after a failed fork; close this one if it has registrations."""
        self._spent = True
        self.close_if_registered()

    def close(self) -> None:
        """Close the engine and with it every registration, before the registered memory is freed. Idempotent.

        Does not wait for an engine that is still being opened: it is closed as soon as it is open.
        """
        self._spent = True
        memory, self._registered_memory = self._registered_memory, None

        def close(opened: concurrent.futures.Future[TransferEngine]) -> None:
            if (error := opened.exception()) is not None:
                logger.debug("%s", error)
            else:
                close_or_quarantine(opened.result(), memory)

        if self._opening is not None:
            self._opening.add_done_callback(close)  # runs at once if the engine is open

    def abandon(self, memory: Any, *, hangs: bool = False) -> None:
        """Close the engine after a call that may still write to ``memory``, or that never returned.

        Args:
            hangs: see :func:`close_in_background`.
        """
        engine = self.opened()
        self._lose("the engine was given up, because a call did not end")
        if hangs:
            close_in_background(engine, memory)
        else:
            close_or_quarantine(engine, memory)

    def _lose(self, reason: str) -> None:
        """Leave the engine to another owner; :meth:`renew` opens a new one."""
        self._opening = concurrent.futures.Future()
        self._opening.set_exception(EngineError(self.name, "open", reason))
        self._registered_memory, self._spent = None, True


def close_or_quarantine(engine: TransferEngine, memory: Any) -> None:
    """Close ``engine``; if that fails, keep it and ``memory`` until the process ends.

    Args:
        memory: what keeps the registered memory alive; None if nothing is registered.
    """
    try:
        engine.close()
    except Exception as error:  # noqa: BLE001 - engines of other distributions may raise anything
        text = str(error) if isinstance(error, EngineError) else f"engine {engine.name}: close failed: {error!r}"
        if memory is None:
            logger.debug("%s", text)
            return
        logger.warning("%s; its buffers stay allocated until this process ends", text)
        _quarantine.append((engine, memory))


def close_in_background(engine: TransferEngine, memory: Any) -> None:
    """As :func:`close_or_quarantine`, after a call that hangs and may hold the engine's lock."""
    start_on_thread(lambda: close_or_quarantine(engine, memory), "rfork-close")


def call_together(calls: Sequence[Callable[[], None]], timeout_s: float) -> None:
    """Make ``calls``, which close engines, at the same time, and wait for them up to ``timeout_s`` seconds.

    Those that take longer go on in the background, and keep the memory that they refer to.
    """
    under_way = []
    for call in calls:
        try:
            under_way.append(start_on_thread(call, "rfork-close"))
        except RuntimeError:  # no thread can be started: too many, or the interpreter is ending
            call()
    if late := concurrent.futures.wait(under_way, timeout_s).not_done:
        logger.warning("%d engines are not closed after %.1f s; that goes on in the background", len(late), timeout_s)


def call_engine(engine: TransferEngine, operation: str, timeout_s: float, call: Callable[[], T]) -> T:
    """The result of a native call, made on a thread of its own and given up if the engine exceeds its own bound.

    Args:
        timeout_s: that bound, in seconds.

    Raises:
        EngineHangs: the call did not return :data:`GRACE_S` after its bound.
        EngineError: the engine's own.
    """
    try:
        return call_with_deadline(call, timeout_s + GRACE_S, f"rfork-{operation}")
    except DeadlineExceeded as late:
        raise EngineHangs(engine.name, operation, str(late), in_flight=True) from None
    except ForkError:
        raise
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}"
        raise EngineError(engine.name, operation, text, side="receiver") from error
