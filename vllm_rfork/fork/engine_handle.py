"""A worker's transfer engine: opened in the background, registered, handed to a seed, closed, or quarantined."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vllm_rfork.engines.base import EngineConfig, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, ForkError
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import Region
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline, start_on_thread

logger = worker_logger(__name__)

T = TypeVar("T")

#: How long past its own bound an engine's call may take before it is given up, in seconds.
GRACE_S = 1.0

#: Engines that could not be closed, with the memory that they may still write to or serve. Kept until the process ends.
_quarantine: list[tuple[TransferEngine, Any]] = []


class EngineHandle:
    """The engine of one worker. Opening begins at once, on a thread of its own.

    Args:
        name: an engine's name, see ``engines/registry.py``.
        times: gets the seconds of opening and of registering.
    """

    def __init__(self, name: str, config: EngineConfig, times: StageTimes) -> None:
        self.name = name
        self._config = config
        self._times = times
        self._registered_memory: Any = None  # keeps it alive until the engine is closed
        self._spent = False  # a seed needs another one
        self._opening = start_on_thread(self._open, "rfork-engine")

    def _open(self) -> TransferEngine:
        try:
            with self._times.stage("engine"):
                engine = engine_class(self.name)()
                engine.open(self._config)
        except ForkError:
            raise
        except BaseException as error:
            text = f"unexpected {type(error).__name__}: {error}"
            raise EngineError(self.name, "open", text) from error
        self._times.outside["engine"] = "overlapped"
        return engine

    def opened(self) -> TransferEngine:
        """The open engine; waits for it.

        Raises:
            EngineError: it could not be opened, or not in time; or it now belongs to a seed.
        """
        bound_s = self._config.timeout_s + GRACE_S
        try:
            return self._opening.result(bound_s)
        except concurrent.futures.TimeoutError as error:
            raise EngineError(self.name, "open", f"not open after {bound_s:g} s") from error

    def register(self, regions: Sequence[Region], memory: Any, timeout_s: float) -> None:
        """Register ``regions`` if nothing is registered yet, and keep ``memory`` until the engine is closed.

        Raises:
            EngineError: it failed, or did not return within ``timeout_s`` seconds.
        """
        engine = self.opened()
        if engine.registered_nbytes:
            return
        with self._times.stage("registration"):
            call_engine(engine, "register", timeout_s, lambda: engine.register(regions))
        self._registered_memory = memory

    def hand_over(self) -> TransferEngine:
        """The engine for the seed that this worker becomes: a new one after a discard, a close or a hand-over.

        Raises:
            EngineError: it cannot be opened.
        """
        if self._spent:
            self.close()
            self._opening = start_on_thread(self._open, "rfork-engine")
        engine = self.opened()
        self._opening = concurrent.futures.Future()
        self._opening.set_exception(EngineError(self.name, "open", "the engine now belongs to the seed"))
        self._registered_memory, self._spent = None, True
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

        self._opening.add_done_callback(close)  # runs at once if the engine is open

    def abandon(self, memory: Any) -> None:
        """Close the engine after a call that may still write to ``memory``."""
        self._registered_memory, self._spent = None, True
        close_or_quarantine(self.opened(), memory)


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


def call_engine(engine: TransferEngine, operation: str, timeout_s: float, call: Callable[[], T]) -> T:
    """The result of a native call, made on a thread of its own and given up if the engine exceeds its own bound.

    Args:
        timeout_s: that bound, in seconds.

    Raises:
        EngineError: the engine's own; or one with ``in_flight`` if the call did not return :data:`GRACE_S` after its
            bound: the thread and the buffers then belong to the engine until the process ends.
    """
    try:
        return call_with_deadline(call, timeout_s + GRACE_S, f"rfork-{operation}")
    except DeadlineExceeded as late:
        raise EngineError(
            engine.name,
            operation,
            str(late),
            retry_elsewhere=False,
            in_flight=True,
            side=None,  # by the operation
        ) from None
    except ForkError:
        raise
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}"
        raise EngineError(engine.name, operation, text, side="receiver") from error
