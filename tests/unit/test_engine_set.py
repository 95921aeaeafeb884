"""The engines of one worker: how long it waits for them, and which of them its seed gets."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from tests.flow.memory_seed import NBYTES
from tests.lane_engines import CALLS, Alpha, Beta, Gamma, raises, recorded
from tests.unit.test_lanes import Pair, pair
from vllm_rfork.errors import EngineError, EngineUnavailable, ForkError
from vllm_rfork.fork import engine_handle, engine_set

__all__ = ["pair", "recorded"]
pytestmark = pytest.mark.usefixtures("recorded")


@pytest.fixture
def hangs(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Bounds without a grace, and an event for engines to wait for."""
    for module in (engine_handle, engine_set):
        monkeypatch.setattr(module, "GRACE_S", 0.0)
    return threading.Event()


def test_one_open_engine_is_enough_while_another_hangs(pair: Pair, hangs: threading.Event) -> None:
    Gamma.script["open"] = lambda: hangs.wait(20) and None
    try:
        started = time.monotonic()
        pair.engines("gamma", "alpha", timeout_s=5.0).await_one()
        assert time.monotonic() - started < 3
    finally:
        hangs.set()


def test_engines_that_all_hang_cost_two_bounds(
    pair: Pair, hangs: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``FromFork.reserve`` tells the other ranks of two."""
    monkeypatch.setattr(Gamma, "opens_quickly", False)
    for engine in (Alpha, Beta, Gamma):
        engine.script["open"] = lambda: hangs.wait(20) and None
    try:
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"alpha.*beta.*gamma|alpha.*gamma.*beta"):
            pair.engines("alpha", "beta", "gamma", timeout_s=0.8).await_one()
        assert time.monotonic() - started < 2.5 * 0.8
    finally:
        hangs.set()


def test_no_engine_is_lost_if_one_opens_with_an_error_of_another_kind(pair: Pair) -> None:
    Beta.script["open"] = raises(ForkError("the adapter's own"))
    engines = pair.engines("alpha", "beta")
    opened = engines._handles["alpha"].opened()
    assert engines.hand_over() == [opened]
    opened.close()


@pytest.mark.parametrize(
    ("error", "new"),
    [
        (EngineError("alpha", "connect", "it did not answer in time"), True),
        (EngineError("alpha", "register", "no"), True),
        (EngineError("alpha", "connect", "the seed is gone", side="seed"), False),
        (EngineError("alpha", "connect", "the seed is elsewhere", code="lane"), False),
    ],
)
def test_a_seed_gets_a_new_engine_for_one_that_may_refuse_all_calls(pair: Pair, error: EngineError, new: bool) -> None:
    Alpha.script[error.operation] = raises(error)
    engines = pair.engines("alpha", "beta")
    assert pair.connect(engines, pair.remote("alpha", "beta")).handle.name == "beta"
    failed = engines._handles["alpha"].opened()
    handed = engines.hand_over()
    assert [engine.name for engine in handed] == ["alpha", "beta"]
    assert (handed[0] is not failed) is new
    for engine in handed:
        engine.close()


def test_an_engine_that_has_connected_since_is_not_replaced(pair: Pair) -> None:
    Alpha.script["connect"] = raises(EngineError("alpha", "connect", "it did not answer in time"))
    engines = pair.engines("alpha")
    with pytest.raises(EngineError):
        pair.connect(engines, pair.remote("alpha"))
    Alpha.script.clear()
    lane = pair.connect(engines, pair.remote("alpha"))
    assert engines.hand_over() == [lane.engine]
    lane.engine.close()


def test_engines_that_take_long_to_close_cost_the_time_of_one(pair: Pair) -> None:
    for engine in (Alpha, Beta, Gamma):
        engine.script["close"] = lambda: time.sleep(0.8)
    engines = pair.engines("alpha", "beta", "gamma")
    for name in engines.order:
        engines._handles[name].opened()
    started = time.monotonic()
    engines.close()
    assert time.monotonic() - started < 1.5
    for engine in (Alpha, Beta, Gamma):
        engine.script.clear()


def test_what_opens_quickly_and_the_first_other_engine_are_opened_at_once(pair: Pair) -> None:
    engines = pair.engines("alpha", "beta", "gamma")
    engines.start_opening()
    engines.start_opening()
    for name in ("alpha", "gamma"):
        engines._handles[name].opened()
    assert sorted(CALLS) == ["alpha open", "gamma open"]


def test_a_worker_waits_for_one_engine_and_opens_another_if_the_first_ones_fail(pair: Pair) -> None:
    Alpha.script["open"] = Gamma.script["open"] = raises(EngineError("x", "open", "no"))
    pair.engines("alpha", "beta", "gamma").await_one()
    assert "beta open" in CALLS


def test_with_no_engine_at_all_the_error_is_the_engines(pair: Pair) -> None:
    one, two = EngineError("alpha", "open", "first"), EngineUnavailable("beta", "second", hint="pip install it")
    Alpha.script["open"], Beta.script["open"] = raises(one), raises(two)
    with pytest.raises(EngineError) as caught:
        pair.engines("alpha").await_one()
    assert caught.value is one
    with pytest.raises(EngineError, match=r"first.*second; pip install it"):
        pair.engines("alpha", "beta").await_one()


@pytest.mark.parametrize(
    ("named", "error", "level"),
    [
        (True, EngineUnavailable("alpha", "not here", hint="pip install it"), "WARNING"),
        (False, EngineUnavailable("alpha", "not here", hint="pip install it"), "DEBUG"),
        (True, EngineError("alpha", "open", "not here"), "WARNING"),
        (False, EngineError("alpha", "open", "not here"), "INFO"),
    ],
)
def test_an_engine_that_cannot_be_opened_is_reported_once(
    pair: Pair, named: bool, error: EngineError, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    Alpha.script["open"] = raises(error)
    engines = pair.engines("alpha", "beta", named=named)
    engines.await_one()
    assert pair.connect(engines, pair.remote("alpha", "beta")).handle.name == "beta"
    assert [engine.name for engine in engines.hand_over()] == ["beta"]
    told = [record.levelname for record in caplog.records if "the other engines are used" in record.getMessage()]
    assert told == [level]


def test_a_seed_gets_all_engines_that_open_with_the_forks_registrations(pair: Pair) -> None:
    engines = pair.engines("gamma", "alpha", "beta")
    pair.connect(engines, pair.remote("alpha"))
    handed = engines.hand_over()
    assert [(each.name, each.registered_nbytes) for each in handed] == [("gamma", 0), ("alpha", NBYTES), ("beta", 0)]
    again = engines.hand_over()
    assert not {id(each) for each in handed} & {id(each) for each in again}, "new ones"
    for each in (*handed, *again):
        each.close()


def test_an_engine_that_is_late_is_left_out_and_closed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_rfork.fork.engine_set.GRACE_S", 0.0)
    ends = threading.Event()
    Alpha.script["open"] = lambda: ends.wait(20) and None
    handed = pair.engines("alpha", "beta", timeout_s=0.5).hand_over()
    assert [each.name for each in handed] == ["beta"]
    ends.set()
    deadline = time.monotonic() + 10
    while "alpha close" not in CALLS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    handed[0].close()
