"""A cancellation always arrives, also together with the result."""

from __future__ import annotations

import asyncio

import pytest

from vllm_rfork.net.within import within


async def test_the_result_or_the_error_in_time() -> None:
    async def answer() -> int:
        await asyncio.sleep(0)
        return 7

    async def fail() -> int:
        raise ZeroDivisionError

    assert await within(answer(), 10.0) == 7
    with pytest.raises(ZeroDivisionError):
        await within(fail(), 10.0)


async def test_what_takes_too_long_has_ended_when_this_returns() -> None:
    ended = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    with pytest.raises(asyncio.TimeoutError):
        await within(hang(), 0.01)
    assert ended.is_set()
    cancelled = asyncio.create_task(within(hang(), 10.0))
    ended.clear()
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert ended.is_set()


async def test_a_cancellation_that_comes_with_the_result_is_not_lost() -> None:
    answer = asyncio.get_running_loop().create_future()

    async def wait() -> str:
        found: str = await answer
        return found

    waiting = asyncio.create_task(within(wait(), 10.0))
    for _ in range(3):
        await asyncio.sleep(0)
    answer.set_result("in the same moment")
    await asyncio.sleep(0)  # the inner coroutine has its result now, and the outer one does not know it yet
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
