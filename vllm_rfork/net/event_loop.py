"""One event-loop thread per process: the only bridge between vLLM's synchronous code and asyncio.

All HTTP runs in this loop: planner and seed calls, lease renewal, heartbeats, the seed service. Loader code uses
:meth:`Background.call` (wait for a result, with a timeout) and :meth:`Background.spawn` (return at once). The thread is
a daemon and never keeps a process alive.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import os
import threading
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)

T = TypeVar("T")

THREAD_NAME = "rfork-background"
#: Threads for name resolution, which blocks; more lookups than this wait.
_IO_THREADS = 4
_numbers = itertools.count(1)


class BackgroundTask:
    """Handle of a coroutine that runs in the background; :meth:`Background.spawn` creates it."""

    def __init__(self, owner: Background, coro: Coroutine[Any, Any, object], name: str) -> None:
        self.name = name
        self._owner = owner
        self._coro = coro
        self._ended = threading.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        """True once the coroutine has ended, its cleanup included."""
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> None:
        """Block until the coroutine has ended, however it ended.

        Raises:
            TimeoutError: it is still running after ``timeout_s`` seconds.
            RuntimeError: called from the loop's own thread.
        """
        self._owner.refuse_own_thread("BackgroundTask.wait")
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"background task {self.name} is still running after {timeout_s:g} s")

    def cancel(self, timeout_s: float) -> None:
        """Cancel the coroutine and block until its cleanup has run. Cancelling an ended task does nothing.

        Raises:
            TimeoutError: the cleanup is still running after ``timeout_s`` seconds.
            RuntimeError: called from the loop's own thread.
        """
        self._owner.refuse_own_thread("BackgroundTask.cancel")
        if not self.done:
            self._owner.in_loop(self._cancel)
        self.wait(timeout_s)

    def start(self) -> None:
        """Start the coroutine. Called once, in the loop."""
        self._task = asyncio.get_running_loop().create_task(self._guarded(), name=self.name)
        self._task.add_done_callback(self._at_end)

    def _cancel(self) -> None:
        if self._task is not None:  # start() was queued in the loop before this
            self._task.cancel()

    async def _guarded(self) -> None:
        try:
            await self._coro
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("Background task %s ended with an error", self.name)

    def _at_end(self, task: asyncio.Task[None]) -> None:
        self._coro.close()  # a task cancelled before its first step never touched it
        self._ended.set()


class Background:
    """An event loop in a daemon thread. :func:`background` returns the process's own."""

    def __init__(self) -> None:
        self._io_prefix = f"{THREAD_NAME}-io{next(_numbers)}"
        self._executor = concurrent.futures.ThreadPoolExecutor(_IO_THREADS, thread_name_prefix=self._io_prefix)
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(self._executor)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    @property
    def closed(self) -> bool:
        """True after :meth:`close`; a closed loop accepts no more work."""
        return self._closed

    def refuse_own_thread(self, what: str) -> None:
        """Raise RuntimeError if the caller runs in the loop itself, because waiting there would never end."""
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"{what} was called from inside the background loop; await the coroutine instead")

    def in_loop(self, callback: Any, *args: Any) -> None:
        """Schedule ``callback(*args)`` in the loop.

        Raises:
            RuntimeError: after :meth:`close`.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("the background loop is closed")
            self._loop.call_soon_threadsafe(callback, *args)

    def call(self, coro: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run ``coro`` in the loop and block for its result, at most ``timeout_s`` seconds.

        Raises:
            TimeoutError: no result in time; the coroutine was cancelled, its cleanup may still be running.
            RuntimeError: called from the loop's own thread, or the loop was closed before there was a result.
            Exception: whatever the coroutine raised.
        """
        try:
            self.refuse_own_thread("Background.call")
            with self._lock:
                if self._closed:
                    raise RuntimeError("the background loop is closed")
                future = asyncio.run_coroutine_threadsafe(coro, self._loop)
        except RuntimeError:
            coro.close()  # otherwise Python warns about a coroutine that was never awaited
            raise
        try:
            return future.result(timeout_s)
        except concurrent.futures.CancelledError as error:
            raise RuntimeError("the background loop was closed before there was a result") from error
        except BaseException as error:
            # If an exit interrupts the wait, the coroutine must not keep running either.
            if future.cancel():
                if isinstance(error, concurrent.futures.TimeoutError):
                    raise TimeoutError(f"no result from the background loop within {timeout_s:g} s") from error
                raise
            if isinstance(error, Exception):
                return future.result()  # it ended in the same instant, or the error is its own
            raise

    def spawn(self, coro: Coroutine[Any, Any, object], name: str) -> BackgroundTask:
        """Run ``coro`` in the loop and return at once. An exception that escapes it is logged once, with ``name``.

        Raises:
            RuntimeError: after :meth:`close`.
        """
        task = BackgroundTask(self, coro, name)
        try:
            self.in_loop(task.start)
        except RuntimeError:
            coro.close()
            raise
        return task

    def close(self, timeout_s: float) -> None:
        """Cancel everything, wait for the cleanups and end the threads. Closing twice does nothing.

        Raises:
            TimeoutError: a task or a thread outlived ``timeout_s`` seconds.
            RuntimeError: called from the loop's own thread.
        """
        self.refuse_own_thread("Background.close")
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = time.monotonic() + timeout_s
        try:
            asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result(timeout_s)
        except concurrent.futures.TimeoutError as error:
            raise TimeoutError(f"background tasks are still running after {timeout_s:g} s") from error
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in [self._thread, *self._io_threads()]:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"thread {thread.name} is still running after {timeout_s:g} s")
        self._loop.close()

    async def _end_tasks(self) -> None:
        ours = asyncio.current_task()
        while others := [task for task in asyncio.all_tasks() if task is not ours]:
            for task in others:
                task.cancel()
            await asyncio.wait(others)
            await asyncio.sleep(0)  # their done callbacks
        await self._loop.shutdown_asyncgens()

    def _io_threads(self) -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith(self._io_prefix + "_")]


class _Process:
    """The event loop of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.current: Background | None = None


_process = _Process()
#: Loops of parent processes. A forked child shares the parent's epoll descriptor, so closing or collecting the
#: parent's loop in the child could unregister the parent's sockets. It is kept as it is for the child's lifetime.
_inherited: list[_Process] = []


def _forget_parent() -> None:
    global _process  # noqa: PLW0603 - as a whole: its lock may be held by a thread that the child does not have
    _inherited.append(_process)
    _process = _Process()


os.register_at_fork(after_in_child=_forget_parent)


def background() -> Background:
    """The process's own loop, started on first use, and again after a fork or after it was closed."""
    process = _process
    with process.lock:
        if process.current is None or process.current.closed:
            process.current = Background()
        return process.current
