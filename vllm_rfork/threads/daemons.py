"""An executor for event loops whose process may exit while a name is still being resolved."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

from vllm_rfork.threads.deadline import start_on_thread


class DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """Runs each call on a daemon thread called ``name``; neither the loop's end nor the process's exit waits for it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Start ``fn`` at once."""
        return start_on_thread(lambda: fn(*args, **kwargs), self._name, delays_exit=False)
