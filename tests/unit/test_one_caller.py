"""The lock of an engine: one caller at a time, and refusals by its state."""

from __future__ import annotations

import threading

import pytest

from vllm_rfork.engines.one_caller import OneCaller
from vllm_rfork.errors import EngineError


@pytest.fixture
def calls() -> OneCaller:
    made = OneCaller("some")
    made.opened(0.05)
    return made


def test_a_second_caller_waits_for_its_turn_or_is_refused(calls: OneCaller) -> None:
    refused: list[EngineError] = []

    def second() -> None:
        for bound_s in (0.0, 0.01):
            try:
                with calls.turn("read", bound_s):
                    pass
            except EngineError as error:
                refused.append(error)

    with calls.turn("read"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert [(error.code, error.in_flight, error.retry_elsewhere) for error in refused] == [("timeout", False, True)] * 2
    with calls.turn("read"):
        pass


def test_the_turn_ends_when_its_block_raises(calls: OneCaller) -> None:
    with pytest.raises(ValueError), calls.turn("read"):  # noqa: PT011 - it is this test's own
        raise ValueError
    with calls.turn("read"):
        pass


def test_closing_refuses_calls_and_does_not_wait_for_ever(calls: OneCaller) -> None:
    native = object()
    assert calls.usable("read", native) is native
    with calls.turn("read"), pytest.raises(EngineError) as late, calls.last_turn():
        pass
    assert (late.value.operation, late.value.in_flight) == ("close", True)
    with pytest.raises(EngineError, match="not open"):
        calls.usable("read", native)
    with calls.last_turn():
        pass
    calls.opened(0.05)
    assert calls.usable("read", native) is native


def test_an_engine_that_is_not_open_or_stuck_is_not_usable(calls: OneCaller) -> None:
    with pytest.raises(EngineError, match="not open"):
        calls.usable("read", None)
    calls.stuck = "the peer stopped"
    with pytest.raises(EngineError, match="the peer stopped") as stuck:
        calls.usable("read", object())
    assert stuck.value.in_flight
