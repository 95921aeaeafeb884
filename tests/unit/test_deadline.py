"""A call with a deadline returns, raises or is given up in time, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline, start_on_thread


def test_the_result_comes_from_a_daemon_thread_of_that_name() -> None:
    thread = call_with_deadline(threading.current_thread, 10.0, "rfork-test")
    assert (thread.name, thread.daemon) == ("rfork-test", True)


@pytest.mark.parametrize("error", [ValueError("no"), TimeoutError("the call's own"), OSError("gone")])
def test_the_call_s_own_error_is_raised_as_it_is(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        call_with_deadline(fail, 10.0, "rfork-test")
    assert caught.value is error
    assert not isinstance(caught.value, DeadlineExceeded)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_would_end_the_calling_thread_is_an_ordinary_error(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(RuntimeError, match=type(error).__name__):
        call_with_deadline(fail, 10.0, "rfork-test")


def test_a_call_that_hangs_is_given_up_in_time() -> None:
    release = threading.Event()
    started = time.monotonic()
    try:
        with pytest.raises(DeadlineExceeded):
            call_with_deadline(release.wait, 0.05, "rfork-test")
        assert time.monotonic() - started < 5.0
    finally:
        release.set()


def test_a_failure_keeps_nothing_alive_once_it_is_dropped() -> None:
    """What it came through holds a model's tensors, and the memory is needed again at once."""

    class Model:
        pass

    def fail() -> None:
        model = Model()
        seen.append(weakref.ref(model))
        raise ValueError("no")

    seen: list[weakref.ref[Model]] = []
    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            call_with_deadline(fail, 10.0, "rfork-test")
        assert seen[0]() is None
    finally:
        gc.enable()


def test_a_future_can_be_waited_for_later() -> None:
    go = threading.Event()
    future = start_on_thread(lambda: go.wait(10.0), "rfork-test")
    assert not future.done()
    go.set()
    assert future.result(10.0)


def test_an_exit_does_not_wait_for_a_call_that_says_so() -> None:
    code = (
        "import time; from vllm_rfork.threads.deadline import start_on_thread;"
        "start_on_thread(lambda: time.sleep(60), 'rfork-test', delays_exit=False)"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
    assert time.monotonic() - started < 9.0, "an exit waits for native threads for ten seconds"
