"""Seeds on their way, with changes and captures of graphs in between: what a thread does that is late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_rfork.errors import ForkError
from vllm_rfork.seeding import manager

pytestmark = pytest.mark.vllm

REASON = "weights are updated"


class Process:
    """The seeds of a process: their starts do nothing but wait for :attr:`go`."""

    def __init__(self) -> None:
        self.begun: list[Any] = []
        self.closed: list[Any] = []
        self.go = threading.Event()
        self.go.set()

    def start(self, plan: Any, start: Any) -> None:
        self.begun.append(start)
        self.go.wait(60)
        start.off_device.set()

    def plan(self, device: str = "cuda") -> Any:
        plan = SimpleNamespace(device=torch.device(device))
        plan.attempt = SimpleNamespace(close=lambda: self.closed.append(plan))
        return plan

    def begin(self, device: str = "cuda") -> Any:
        plan = self.plan(device)
        vouched = SimpleNamespace(again=lambda: (None, []), hopeless=False, kept=None, forget=lambda: None)
        start = manager._Start(plan, vouched, changes=manager._withdrawals.count)  # type: ignore[arg-type]
        start.begin()
        return start


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    one = Process()
    monkeypatch.setattr(manager, "_start", one.start)
    for name in ("_seeds", "_starting", "_absent"):
        monkeypatch.setattr(manager, name, [])
    monkeypatch.setattr(manager, "_withdrawals", manager._Withdrawals())
    yield one
    one.go.set()
    for start in one.begun:
        start.thread.join(60)


def test_a_change_that_begins_while_a_seed_comes_back_keeps_it_away(process: Process) -> None:
    """It did not find that seed to withdraw it, so the seed must see for itself that its time is over."""
    start = process.begin()
    manager.withdraw_all(REASON, may_return=True)

    def again() -> Any:
        manager.withdraw_all("another change", may_return=True)
        return None, []

    start.vouched.again = again
    manager.come_back()
    assert len(process.begun) == 1, "a seed came in the middle of a change"
    assert manager._starting == []

    start.vouched.again = lambda: (None, [])
    manager.come_back()
    assert len(process.begun) == 2, "no seed came after it"


@pytest.mark.parametrize("finding", ["found", "not found"])
def test_a_worker_that_is_over_remembers_no_seed(process: Process, finding: str) -> None:
    start = process.begin()
    manager.withdraw_all(REASON, may_return=True)

    def again() -> Any:
        manager.withdraw_all("the worker shuts down")
        if finding == "not found":
            raise ForkError("tensors are gone")
        return None, []

    start.vouched.again = again
    manager.come_back()
    assert manager._absent == []
    assert len(process.begun) == 1


def test_a_change_between_capturing_and_starting_keeps_the_seed_away(process: Process) -> None:
    plan, vouched = process.plan(), SimpleNamespace(hopeless=False)
    start = manager._Start(plan, vouched, changes=manager._withdrawals.count)  # type: ignore[arg-type]
    manager.withdraw_all(REASON, may_return=True)
    start.begin()
    assert process.begun == []
    assert manager._absent == [start]
    assert process.closed == [plan], "its engine and its promise to the planner are given back"


def test_graphs_wait_for_seeds_that_still_need_the_device(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = manager._Guard()
    assert guard.leaves_device_alone(), "there is no seed"

    process.go.clear()
    process.begin("cpu")
    assert guard.leaves_device_alone(), "a processor captures nothing"

    process.begin()
    monkeypatch.setattr(manager, "LEAVES_DEVICE_WITHIN_S", 0.05)
    assert not guard.leaves_device_alone()

    monkeypatch.setattr(manager, "LEAVES_DEVICE_WITHIN_S", 20.0)
    threading.Timer(0.05, process.go.set).start()
    assert guard.leaves_device_alone(), "it has what it needs"
