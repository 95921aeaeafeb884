"""Changes to the weights of this process: while one is going on, it offers no seed.

Changes are methods and functions that are called on workers (``worker_hooks.py``, ``worker_calls.py``). They call each
other, and some stay open from one call to another. Must not decide what the weights are worth: the guard does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Change:
    """What a worker method does to weights.

    Attributes:
        reason: what the log says.
        begins: a change that the method leaves open, if it is one.
        ends: changes that are over when the method has returned.
        ends_failing: changes that are over when it has raised.
        last: after it the weights are not those of the seed's key any more, or the memory is gone: there is no
            coming back.
    """

    reason: str
    begins: str = ""
    ends: tuple[str, ...] = ()
    ends_failing: tuple[str, ...] = ()
    last: bool = False


class Guard(Protocol):
    """Whoever knows the seeds of this process. No method may raise."""

    def withdraw(self, reason: str, *, last: bool) -> None:
        """Be no seed any more when this returns; ``last``: for good."""

    def leaves_device_alone(self) -> bool:
        """Wait a little for seeds that are being started; False where one may still need the device."""

    def come_back(self) -> None:
        """No change is open any more: be a seed again if the weights are what they were."""


class Changes:
    """Which changes are going on in this process, in methods that call each other and from method to method."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._lock = threading.Lock()
        self._running = 0
        self._open: set[str] = set()

    @property
    def active(self) -> bool:
        """Whether a method or function that may change weights is running now."""
        return self._running > 0

    def run(self, change: Change, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``method`` with the seed withdrawn, and let it come back after the outermost one."""
        with self._lock:
            self._running += 1
            if change.last:
                self._open.clear()  # what comes after it is another model
            self._open.update({change.begins} - {""})
        self._guard.withdraw(change.reason, last=change.last)
        ended = change.ends_failing
        try:
            returned = method(*args, **kwargs)
            ended = change.ends
            return returned
        finally:
            with self._lock:
                self._running -= 1
                self._open.difference_update(ended)
                over = not self._running and not self._open and not change.last
            if over:
                self._guard.come_back()

    def run_alone(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``method`` while no seed of this process asks anything of the device."""
        if self._guard.leaves_device_alone():
            return method(*args, **kwargs)
        return self.run(Change("graphs are captured"), method, *args, **kwargs)
