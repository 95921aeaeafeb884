"""A withdrawal that meets a seed while it is being made: it does not wait for ever, and nothing comes after it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.open_engines import open_engines
from tests.vllm.conftest import LogRecords, Planner, eventually, extra_for
from tests.vllm.engine_process import load, vllm_config
from tests.vllm.faults import held_up_recheck
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.seeding.manager import SeedManager, manager

pytestmark = pytest.mark.vllm


def withdraw() -> None:
    manager().withdraw("weights are updated", last=True)


def test_no_seed_comes_after_a_withdrawal_that_met_it_while_it_was_made(
    model_a: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch, no_seeds: None
) -> None:
    """The bytes may have changed since: what was captured before the withdrawal must never be announced."""
    making, go_on = threading.Event(), threading.Event()
    make = SeedManager._make

    def slowly(*args: Any) -> Any:
        making.set()
        assert go_on.wait(60)
        return make(*args)

    monkeypatch.setattr(SeedManager, "_make", staticmethod(slowly))
    extra = extra_for(planner.url, model_url="withdrawn while made")
    load(vllm_config(model_a, load_format="rfork", extra=extra))
    assert making.wait(60)
    starting = manager().slots
    manager().withdraw("weights are updated", last=True)
    go_on.set()
    for each in starting:
        assert each.thread is not None
        each.thread.join(60)
    assert manager().seeds(1) == []
    eventually(lambda: not open_engines(), "the engine is closed")


def test_a_withdrawal_does_not_wait_for_all_of_a_start(
    model_a: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch, no_seeds: None
) -> None:
    """It meets the start in the check of the bytes: nothing is served or announced after that."""
    checking, go_on = held_up_recheck(monkeypatch)
    monkeypatch.setattr("vllm_rfork.seeding.seed.SeedService", lambda **_: pytest.fail("a service was made"))
    load(vllm_config(model_a, load_format="rfork", extra=extra_for(planner.url, model_url="withdrawn while checked")))
    assert checking.wait(60)
    # It is in the list by now, where the withdrawal finds it.
    (slot,) = manager().slots
    seed = slot.seed
    assert seed is not None
    withdrawal = threading.Thread(target=withdraw)
    withdrawal.start()
    eventually(seed._withdrawing.is_set, "the withdrawal has begun")
    go_on.set()
    withdrawal.join(60)
    assert manager().seeds(5) == []
    eventually(lambda: not open_engines(), "the engine is closed")


def test_a_withdrawal_is_bounded_where_a_start_never_ends(
    model_a: Path, planner: Planner, monkeypatch: pytest.MonkeyPatch, no_seeds: None, rfork_log: LogRecords
) -> None:
    """A native call that hangs must not take the worker with it; and what comes after it must not be served."""
    registering, go_on = threading.Event(), threading.Event()
    register = MemoryEngine.register

    def hanging(self: MemoryEngine, regions: Any) -> None:
        registering.set()
        assert go_on.wait(60)
        register(self, regions)

    monkeypatch.setattr(MemoryEngine, "register", hanging)
    bounds = {"rfork_request_timeout_sec": 0.5, "rfork_seed_timeout_sec": 0.5}
    extra = extra_for(planner.url, model_url="hangs while registering", **bounds)
    load(vllm_config(model_a, load_format="rfork", extra=extra))
    assert registering.wait(60)
    starting = manager().slots
    withdrawal = threading.Thread(target=withdraw, daemon=True)
    withdrawal.start()
    withdrawal.join(60)
    returned = not withdrawal.is_alive()
    go_on.set()
    for each in starting:
        assert each.thread is not None
        each.thread.join(60)
    assert returned
    assert manager().seeds(1) == []
    assert not any("announced" in line for line in rfork_log.texts())
    eventually(lambda: not open_engines(), "the engine is closed")
