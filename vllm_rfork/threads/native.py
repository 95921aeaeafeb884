"""Threads that run native code (engines, torch), and a bounded wait for them when the process exits.

They are daemons, because a native call that never returns must not keep a process alive. But Python ends a daemon by
force if its native call returns during shutdown, and C++ frames do not survive that: the process aborts with "terminate
called without an active exception", after its real error. So the exit waits a while for these threads.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)

#: How long an exit waits for all of them together, in seconds. Engines open and close in a few seconds.
EXIT_WAIT_S = 10.0

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_lock = threading.Lock()


def native_thread(target: Callable[..., object], name: str, args: tuple[Any, ...] = ()) -> threading.Thread:
    """A daemon thread, not started yet; the exit of the process waits for it."""
    thread = threading.Thread(target=target, args=args, name=name, daemon=True)
    with _lock:
        _threads.add(thread)
    return thread


def wait_for_native_threads(timeout_s: float | None = None) -> None:
    """Wait up to :data:`EXIT_WAIT_S` seconds until all of them have ended; log those that still run."""
    deadline = time.monotonic() + (EXIT_WAIT_S if timeout_s is None else timeout_s)
    with _lock:
        threads = list(_threads)
    for thread in threads:
        if thread.is_alive() and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
    running = sorted(thread.name for thread in threads if thread.is_alive())
    if running:
        logger.warning("This process exits while native calls still run, and may abort: threads=%s", ", ".join(running))


atexit.register(wait_for_native_threads)
