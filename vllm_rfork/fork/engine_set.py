"""The transfer engines of one worker, in its order of preference: opened when they are needed, handed to its seed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_rfork.engines.base import EngineConfig, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, EngineUnavailable, RForkError
from vllm_rfork.fork.engine_handle import GRACE_S, EngineHandle, call_together
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import Manifest

logger = worker_logger(__name__)

#: How often a wait for engines asks whether to go on, in seconds.
_LOOK_S = 0.1


@dataclass(frozen=True)
class Candidate:
    """An engine that both a seed and this worker have, and the seed's endpoint for it."""

    handle: EngineHandle
    endpoint: str


class EngineSet:
    """See the module's docstring. Not thread-safe, except that a seed's start may follow on another thread.

    Args:
        order: names of engines, the preferred one first; see :func:`~vllm_rfork.engines.registry.engine_order`.
        named: the user named these engines, so one that cannot be opened is a WARNING.
    """

    def __init__(self, order: Sequence[str], config: EngineConfig, *, named: bool = True) -> None:
        self.order = tuple(order)
        self.config = config
        self._named = named
        self._handles = {name: EngineHandle(name, config) for name in self.order}
        self._reported: set[str] = set()

    def start_opening(self) -> None:
        """Begin to open, in the background, what opens quickly and the first other engine in the order. Idempotent.

        The seed that this worker becomes needs the latter anyway. The rest is opened when a fork or the seed needs it.
        """
        for name in opened_first(self.order):
            self._handles[name].start_opening()

    def await_one(self) -> None:
        """Wait until one engine is open: without one, a lease would be useless.

        Waits for the engines that are opened at once, and only if all of these fail, for the rest: up to two of the
        engines' bounds for opening.

        Raises:
            EngineError: none can be opened.
        """
        first = opened_first(self.order)
        failures: list[EngineError] = []
        for names in (first, [name for name in self.order if name not in first]):
            if self._one_opens(names, failures):
                return
        raise _none_opened(failures)

    def _one_opens(self, names: Sequence[str], failures: list[EngineError]) -> bool:
        """Open ``names`` at the same time; True as soon as one is open, and False, with ``failures``, if none is."""
        waiting = {self._handles[name].start_opening(): self._handles[name] for name in names}
        deadline = time.monotonic() + self.config.timeout_s + GRACE_S
        while waiting:
            left_s = max(0.0, deadline - time.monotonic())
            done = concurrent.futures.wait(waiting, left_s, concurrent.futures.FIRST_COMPLETED).done
            for opening in done or set(waiting):
                try:
                    waiting.pop(opening).opened(0.0)
                except EngineError as error:
                    failures.append(error)
                    self.report_failure(error)
                else:
                    return True
        return False

    def offered_by(self, manifest: Manifest) -> list[Candidate]:
        """The engines that the seed of ``manifest`` offers and this worker has, in this worker's order."""
        offered = {each.engine: each.endpoint for each in manifest.endpoints}
        return [Candidate(self._handles[name], offered[name]) for name in self.order if name in offered]

    def usable_beside(self, manifest: Manifest) -> list[str]:
        """The engines that the seed of ``manifest`` lacks and that have not failed to open here."""
        offered = {each.engine for each in manifest.endpoints}
        return [name for name in self.order if name not in offered and self._handles[name].failure() is None]

    def hand_over(self, proceed: Callable[[], None] = lambda: None) -> list[TransferEngine]:
        """The open engines for the seed that this worker becomes, in its order, with the fork's registrations.

        Opens every engine that is not open, and a new one for each that was closed, discarded or handed over before.
        An engine that fails, or is not open within the engines' bound for opening, is left out.

        Args:
            proceed: called while engines are being opened; what it raises ends the wait, and nothing is handed over.

        Raises:
            EngineError: none can be opened.
        """
        for handle in self._handles.values():
            handle.renew()
        deadline = time.monotonic() + self.config.timeout_s + GRACE_S
        opening = [handle.start_opening() for handle in self._handles.values()]
        while (left_s := deadline - time.monotonic()) > 0:
            if not concurrent.futures.wait(opening, min(left_s, _LOOK_S)).not_done:
                break
            proceed()
        engines, failures = [], []
        for handle in self._handles.values():
            try:
                engines.append(handle.hand_over(0.0))
            except EngineError as error:
                failures.append(error)
                self.report_failure(error)
        if not engines:
            raise _none_opened(failures)
        return engines

    def report_failure(self, error: EngineError) -> None:
        """Log once that an engine cannot be opened, if there are others."""
        if len(self.order) == 1 or error.engine in self._reported:
            return
        self._reported.add(error.engine)
        level = logging.WARNING
        if not self._named:
            level = logging.DEBUG if isinstance(error, EngineUnavailable) else logging.INFO
        logger.log(level, "%s; the other engines are used", error)

    def close_if_registered(self) -> None:
        """Close the engines that have registrations, so that the registered memory may be freed."""
        self._together(EngineHandle.close_if_registered)

    def discard(self) -> None:
        """Record that a seed needs new engines, after a failed fork; close those that have registrations."""
        self._together(EngineHandle.discard)

    def close(self) -> None:
        """Close all engines, and with them every registration. Idempotent; waits for no engine that is being opened."""
        self._together(EngineHandle.close)

    def _together(self, close: Callable[[EngineHandle], None]) -> None:
        calls = [functools.partial(close, handle) for handle in self._handles.values()]
        call_together(calls, self.config.timeout_s + GRACE_S)


def opened_first(order: Sequence[str]) -> list[str]:
    """The names of the engines that are opened at once; those that open quickly come first."""
    quick = [name for name in order if _opens_quickly(name)]
    return quick + [name for name in order if name not in quick][:1]


def _opens_quickly(name: str) -> bool:
    with contextlib.suppress(RForkError):  # an adapter that cannot be imported; opening it reports that
        return engine_class(name).opens_quickly
    return False


def _none_opened(failures: Sequence[EngineError]) -> EngineError:
    """The error of a worker whose engines all failed to open: the only one's own, or one with all texts."""
    if len(failures) == 1:
        return failures[0]
    names = ", ".join(error.engine for error in failures)
    return EngineError(names, "open", "; ".join(str(error) for error in failures))
