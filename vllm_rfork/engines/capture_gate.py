"""Mutual exclusion of graph captures and of device work by engines that send.

While one thread captures a CUDA graph, a call such as an allocation fails in every thread, and the capture with it. A
seed's own threads must therefore do nothing on the device meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: How long a capture waits for device work, in seconds. A batch that makes no progress is given up in 5 s.
CAPTURE_WAITS_S = 10.0


class CaptureGate:
    """Any number of threads work, or any number capture; a capture that waits goes first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._capturing = 0

    @contextmanager
    def working(self, timeout_s: float) -> Iterator[bool]:
        """Do device work in the block. False if a capture does not end in time: then leave the device alone."""
        with self._changed:
            free = self._changed.wait_for(lambda: not self._capturing, max(0.0, timeout_s))
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
