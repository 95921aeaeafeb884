"""A timeout that never loses a cancellation.

Before Python 3.12, ``asyncio.wait_for`` returns a result that arrives at the same moment as a cancellation. The
cancellation is then lost, and its caller waits for a task that continues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(coro: Coroutine[Any, Any, T], timeout_s: float) -> T:
    """The result of ``coro``, which is cancelled after ``timeout_s`` seconds and ends before this returns.

    Raises:
        asyncio.TimeoutError: there was no result in time.
        Exception: whatever ``coro`` raised.
    """
    task = asyncio.ensure_future(coro)
    try:
        done, _ = await asyncio.wait({task}, timeout=max(0.0, timeout_s))
        if done:
            return task.result()
        raise asyncio.TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # otherwise asyncio reports an exception that was never retrieved
