"""Calls that may never return, on a thread of their own and with a deadline."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

from vllm_rfork.threads.native import native_thread

T = TypeVar("T")


class DeadlineExceeded(TimeoutError):
    """The call did not return in time. Its thread continues until the call returns, and the result is dropped."""


def start_on_thread(fn: Callable[[], T], name: str, *, delays_exit: bool = True) -> concurrent.futures.Future[T]:
    """Call ``fn`` on a new daemon thread called ``name``; the future gets its result or whatever it raises.

    It cannot be cancelled: who gives up waiting leaves the call to itself.

    Args:
        delays_exit: wait for the thread when the process exits, as native code requires (:mod:`.native`).
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    arguments = (fn, future)
    if delays_exit:
        thread = native_thread(_run, name, arguments)
    else:
        thread = threading.Thread(target=_run, name=name, args=arguments, daemon=True)
    thread.start()
    return future


def call_with_deadline(fn: Callable[[], T], timeout_s: float, name: str, *, delays_exit: bool = True) -> T:
    """The result of ``fn``, called on a daemon thread called ``name``.

    Raises:
        DeadlineExceeded: no result after ``timeout_s`` seconds.
        Exception: the exception that ``fn`` raised.
        RuntimeError: ``fn`` raised something that is not an ``Exception`` and would end the calling thread.
    """
    future = start_on_thread(fn, name, delays_exit=delays_exit)
    if not concurrent.futures.wait([future], timeout_s).done:
        raise DeadlineExceeded(f"no return within {timeout_s:.1f} s")
    try:
        return future.result()
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
    finally:
        del fn, future  # an error's traceback contains this frame, and the future contains the error


def _run(fn: Callable[[], T], future: concurrent.futures.Future[T]) -> None:
    try:
        future.set_result(fn())
    except BaseException as error:  # noqa: BLE001 - raised again on the thread that waits
        future.set_exception(error)
    finally:
        del fn, future  # the traceback contains this frame: an error would refer to itself through the future
