"""Mutual exclusion of graph captures and of device work by engines that send.

While one thread captures a CUDA graph, a call such as an allocation fails in every thread, and the capture with it. A
seed's own threads must therefore do nothing on the device meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: How long a capture waits for device work, in seconds. A batch that makes no progress is given up in 5 s.
CAPTURE_WAITS_S = 10.0
#: Between two looks at the reasons to give a wait up, in seconds.
_LOOK_S = 0.1


class CaptureGate:
    """Any number of threads work, or any number capture; a capture that waits goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._capturing = 0

    @contextmanager
    def working(self, timeout_s: float, given_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Do device work in the block. False if a capture does not end in time: then leave the device alone.

        Args:
            given_up: ends the wait when it returns True.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._capturing and not given_up() and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left_s, _LOOK_S))
            free = not self._capturing
            self._working += free
        try:
            yield free
        finally:
            with self._changed:
                self._working -= free
                self._changed.notify_all()

    @contextmanager
    def capturing(self, timeout_s: float = CAPTURE_WAITS_S) -> Iterator[bool]:
        """Capture in the block; no work begins meanwhile. False if work has not ended in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._capturing += 1
            idle = self._changed.wait_for(lambda: not self._working, max(0.0, deadline - time.monotonic()))
        try:
            yield idle
        finally:
            with self._changed:
                self._capturing -= 1
                self._changed.notify_all()


#: The gate of this process.
gate = CaptureGate()
