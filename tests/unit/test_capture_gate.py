"""Graph captures and device work by engines exclude each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from vllm_rfork.engines import capture_gate
from vllm_rfork.engines.capture_gate import CaptureGate
from vllm_rfork.vllm_compat.weight_changes import WeightChanges


class Listener:
    """Seeds that do not use the device."""

    def __init__(self) -> None:
        self.withdrawn: list[str] = []

    def withdraw(self, reason: str, *, last: bool) -> None:
        self.withdrawn.append(reason)

    def device_is_idle(self) -> bool:
        return True

    def resume(self) -> None:
        pass


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[CaptureGate]:
    fresh = CaptureGate()
    monkeypatch.setattr(capture_gate, "gate", fresh)
    yield fresh
    with fresh.working(0.0) as free:
        assert free


def in_thread(function: Any) -> Any:
    """The result of ``function`` on another thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(60)
    return results[0]


def test_work_waits_for_the_end_of_a_capture(gate: CaptureGate) -> None:
    with ExitStack() as capture:
        assert capture.enter_context(gate.capturing())
        with gate.working(0.01) as free:
            assert not free
        closer = threading.Timer(0.05, capture.close)
        closer.start()
        with gate.working(30.0) as free:
            assert free
        closer.join()


def test_a_capture_waits_for_work_and_lets_none_begin_meanwhile(gate: CaptureGate) -> None:
    with ExitStack() as work:
        assert work.enter_context(gate.working(0.0))
        closer = threading.Timer(0.05, work.close)
        closer.start()
        with gate.capturing(30.0) as idle:
            assert idle
            with gate.working(0.0) as free:
                assert not free
        closer.join()


def test_two_threads_work_at_a_time(gate: CaptureGate) -> None:
    def second() -> bool:
        with gate.working(0.0) as free:
            return free

    with gate.working(0.0):
        assert in_thread(second)


def test_while_vllm_captures_no_engine_works_and_the_seed_stays(gate: CaptureGate) -> None:
    listener = Listener()

    def capture() -> bool:
        with gate.working(0.0) as free:
            return free

    assert not WeightChanges(listener).run_alone(capture)
    assert listener.withdrawn == []


def test_work_that_does_not_end_costs_the_seed_not_the_capture(
    gate: CaptureGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CaptureGate.capturing.__wrapped__, "__defaults__", (0.01,))  # type: ignore[attr-defined]
    listener = Listener()
    with gate.working(0.0):
        assert in_thread(lambda: WeightChanges(listener).run_alone(lambda: "captured")) == "captured"
    assert listener.withdrawn == ["graphs are captured"]
