"""Changes to the weights of this process: while one is in progress, the process has no seed.

A change is a method or function called on a worker (``worker_hooks.py``, ``worker_calls.py``). Changes call each other,
and some last from one call to another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_rfork.engines import capture_gate


@dataclass(frozen=True)
class Change:
    """The effect of a worker method on weights.

    Attributes:
        reason: text for the log.
        begins: name of a change that lasts beyond the method, or empty.
        ends: changes that end when the method returns.
        ends_failing: changes that end when it raises.
        last: after it the weights do not belong to the seed's key any more, or their memory is gone, so that the seed
            cannot resume.
        writes: it may write weights, and set Python values of the model that depend on them.
        discards: afterwards the bytes of the weights are gone, and the model's Python values are as before.
    """

    reason: str
    begins: str = ""
    ends: tuple[str, ...] = ()
    ends_failing: tuple[str, ...] = ()
    last: bool = False
    writes: bool = True
    discards: bool = False


class WeightChangeListener(Protocol):
    """The owner of this process's seeds. No method may raise."""

    def withdraw(self, reason: str, *, last: bool) -> None:
        """Withdraw all seeds before returning; for good if ``last``."""

    def device_is_idle(self) -> bool:
        """Wait briefly for seeds that are being started; False if one may still use the device."""

    def resume(self) -> None:
        """No change is in progress any more: make the seeds available again if the weights are what they were."""


class WeightChanges:
    """The changes in progress in this process, and the calls of its listener.

    Attributes:
        gone: the bytes of the weights have been discarded, and nothing has written weights since.
        written: something may have written weights since they were loaded.
    """

    def __init__(self, listener: WeightChangeListener) -> None:
        self.gone = self.written = False
        self._listener = listener
        self._lock = threading.Lock()
        self._running = 0
        self._open: set[str] = set()

    @property
    def active(self) -> bool:
        """True if a method or function that may change weights is running now."""
        return self._running > 0

    def lasts(self, name: str) -> bool:
        """True while the change ``name``, of those that last beyond one method, is in progress."""
        return name in self._open

    def settled(self, *, written: bool) -> None:
        """Record that the weights are there: those of a load, or ``written`` by something else."""
        self.gone, self.written = False, written

    def run(self, change: Change, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``method`` with all seeds withdrawn; the end of the outermost change resumes them."""
        with self._lock:
            self._running += 1
            if change.last:
                self._open.clear()  # what follows is another model
            self._open.update({change.begins} - {""})
        self._listener.withdraw(change.reason, last=change.last)
        ended = change.ends_failing
        try:
            returned = method(*args, **kwargs)
            ended = change.ends
            return returned
        finally:
            with self._lock:
                self._running -= 1
                self._open.difference_update(ended)
                self.gone = change.discards or (self.gone and not change.writes)
                self.written = self.written or change.writes
                over = not self._running and not self._open and not change.last
            if over:
                self._listener.resume()

    def run_alone(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``method`` while no seed of this process uses the device, to start or to send."""
        with capture_gate.gate.capturing() as idle:
            if idle and self._listener.device_is_idle():
                return method(*args, **kwargs)
            return self.run(Change("graphs are captured", writes=False), method, *args, **kwargs)
