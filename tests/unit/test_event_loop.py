"""The one bridge between threads and asyncio: bounded, tidy, and alive after a fork."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from vllm_rfork.net import event_loop as module
from vllm_rfork.net.event_loop import Background, background

LONG_S = 3600.0


@pytest.fixture
def bridge() -> Iterator[Background]:
    before = set(threading.enumerate())
    made = Background()
    yield made
    made.close(10)
    assert set(threading.enumerate()) <= before


async def value_of(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail(error: Exception) -> None:
    raise error


def test_call_returns_the_result(bridge: Background) -> None:
    assert bridge.call(value_of(7), 10) == 7


@pytest.mark.parametrize("error", [ValueError("mine"), TimeoutError("mine"), KeyError("mine")])
def test_call_raises_the_coroutines_own_error(bridge: Background, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        bridge.call(fail(error), 10)
    assert caught.value.args == ("mine",)


def test_call_gives_up_in_time_and_cancels(bridge: Background) -> None:
    cancelled = threading.Event()

    async def hang() -> None:
        try:
            await asyncio.sleep(LONG_S)
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError, match=r"within 0\.05 s"):
        bridge.call(hang(), 0.05)
    assert cancelled.wait(60)


def test_call_from_inside_the_loop_is_refused_instead_of_hanging(bridge: Background) -> None:
    async def nested() -> int:
        return bridge.call(value_of(1), 10)

    with pytest.raises(RuntimeError, match="inside the background loop"):
        bridge.call(nested(), 10)


def test_spawn_from_inside_the_loop_is_fine(bridge: Background) -> None:
    ran = threading.Event()

    async def inner() -> None:
        ran.set()

    async def outer() -> None:
        bridge.spawn(inner(), "inner")

    bridge.call(outer(), 10)
    assert ran.wait(60)


def test_an_escaping_exception_is_logged_once_with_the_name(
    bridge: Background, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        task = bridge.spawn(fail(ValueError("the cause")), "heartbeat of k")
        task.wait(60)
    records = [record for record in caplog.records if "heartbeat of k" in record.getMessage()]
    assert len(records) == 1
    assert records[0].exc_info is not None
    assert "the cause" in str(records[0].exc_info[1])


def test_cancel_returns_after_the_cleanup(bridge: Background, caplog: pytest.LogCaptureFixture) -> None:
    started, cleaned = threading.Event(), threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(LONG_S)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    task = bridge.spawn(work(), "work")
    assert started.wait(60)
    assert not task.done
    task.cancel(10)
    assert cleaned.is_set()
    assert task.done
    task.cancel(10)  # once more does nothing
    assert not caplog.records


def test_cancel_before_the_first_step_leaves_nothing_behind(
    bridge: Background, recwarn: pytest.WarningsRecorder
) -> None:
    gate = threading.Event()

    async def block_the_loop() -> None:
        gate.wait(60)

    blocker = bridge.spawn(block_the_loop(), "blocker")
    task = bridge.spawn(asyncio.sleep(LONG_S), "never stepped")
    bridge.in_loop(task._cancel)
    gate.set()
    task.wait(60)
    blocker.wait(60)
    del task
    gc.collect()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


def test_cancel_is_bounded_where_the_cleanup_hangs(bridge: Background) -> None:
    started, let_go = threading.Event(), asyncio.Event()

    async def stubborn() -> None:
        started.set()
        try:
            await asyncio.sleep(LONG_S)
        finally:
            await let_go.wait()

    task = bridge.spawn(stubborn(), "stubborn")
    assert started.wait(60)
    with pytest.raises(TimeoutError, match="stubborn"):
        task.cancel(0.05)
    bridge.in_loop(let_go.set)
    task.wait(60)


def test_close_ends_tasks_and_threads_and_refuses_more_work(recwarn: pytest.WarningsRecorder) -> None:
    before = set(threading.enumerate())
    bridge = Background()
    cleaned = threading.Event()

    async def work() -> None:
        try:
            # A name look-up runs in a thread of its own.
            await asyncio.get_running_loop().getaddrinfo("127.0.0.1", 80)
            await asyncio.sleep(LONG_S)
        finally:
            cleaned.set()

    task = bridge.spawn(work(), "work")
    bridge.call(value_of(1), 10)
    bridge.close(10)
    assert cleaned.is_set()
    assert task.done
    assert set(threading.enumerate()) <= before
    bridge.close(10)
    for refused in (lambda: bridge.call(value_of(1), 10), lambda: bridge.spawn(value_of(1), "late")):
        with pytest.raises(RuntimeError, match="closed"):
            refused()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


def test_a_call_that_waits_while_the_loop_is_closed_is_told() -> None:
    bridge = Background()
    started = threading.Event()
    errors: list[BaseException] = []

    async def work() -> None:
        started.set()
        await asyncio.sleep(LONG_S)

    def caller() -> None:
        try:
            bridge.call(work(), LONG_S)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    assert started.wait(60)
    bridge.close(10)
    thread.join(60)
    assert not thread.is_alive()
    assert "closed" in str(errors[0])


def test_the_process_has_one_bridge_in_a_daemon_thread() -> None:
    first = background()
    assert background() is first
    assert first._thread.daemon
    first.close(10)
    second = background()
    assert second is not first
    assert second.call(value_of(3), 10) == 3
    second.close(10)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_child_gets_a_bridge_of_its_own() -> None:
    parent = background()
    assert parent.call(value_of(1), 10) == 1
    module._process.lock.acquire()  # as if another thread were just starting the bridge: its lock dies with it
    try:
        pid = os.fork()
        if pid == 0:
            ok = background() is not parent and background().call(value_of(2), 10) == 2
            os._exit(0 if ok else 1)
    finally:
        module._process.lock.release()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert background() is parent
    assert parent.call(value_of(3), 10) == 3
    parent.close(10)
