"""The choice of a lane among the engines that a seed offers: order, refusals, failures, bounds, lying endpoints."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.flow.memory_seed import NBYTES, contents, manifest_of
from tests.lane_engines import CALLS, LEASES, Alpha, Beta, Gamma, raises, recorded
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.errors import EngineError, EngineUnavailable, ForkError, SeedError
from vllm_rfork.fork import engine_handle, lanes
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.logs.worker import LoggedTexts
from vllm_rfork.manifest.schema import EngineEndpoint, Manifest
from vllm_rfork.selftest.buffers import Buffer

__all__ = ["recorded"]
pytestmark = pytest.mark.usefixtures("recorded")
LANE = EngineError("alpha", "connect", "the seed is elsewhere; move it", code="lane", retry_elsewhere=True)


class Pair:
    """A seed of this process that offers ``offers``, and a receiver with the engines ``order``."""

    def __init__(self) -> None:
        self.seed_buffer, self.buffer = Buffer("cpu", NBYTES), Buffer("cpu", NBYTES)
        self.seed_buffer.write(0, contents())
        self.seed_engine = MemoryEngine()
        self.seed_engine.open(EngineConfig(device="cpu"))
        self.seed_engine.register(manifest_of(self.seed_buffer).regions)
        self.sets: list[EngineSet] = []
        self.times = StageTimes()

    def remote(self, *offers: str, **endpoints: str) -> Manifest:
        found = [EngineEndpoint(name, endpoints.get(name, self.seed_engine.endpoint)) for name in offers]
        header = manifest_of(self.seed_buffer)
        fields = {name: getattr(header, name) for name in header.__struct_fields__}
        first = {"engine": found[0].engine, "endpoint": found[0].endpoint, "more_endpoints": tuple(found[1:])}
        return Manifest(**{**fields, **first})

    def engines(self, *order: str, timeout_s: float = 10.0, named: bool = True) -> EngineSet:
        made = EngineSet(order, EngineConfig(device="cpu", timeout_s=timeout_s), named=named)
        self.sets.append(made)
        return made

    def connect(
        self, engines: EngineSet, remote: Manifest, *, request_timeout_s: float = 5.0, fork_s: float = 30.0
    ) -> lanes.Lane:
        receiver = lanes.Receiver(
            engines,
            manifest_of(self.buffer).regions,
            self.buffer,
            request_timeout_s,
            time.monotonic() + fork_s,
            LoggedTexts(),
        )
        return lanes.connect(receiver, remote, "10.0.0.1:7000/0", "u1", self.times)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    for engines in made.sets:
        engines.close()
    made.seed_engine.close()


def calls(*names: str) -> list[str]:
    return [call for call in CALLS if call.split()[1] in names]


# --- order -----------------------------------------------------------------------------------------------------------


def test_the_receivers_order_decides_and_not_the_seeds(pair: Pair) -> None:
    lane = pair.connect(pair.engines("beta", "alpha"), pair.remote("alpha", "beta"))
    assert (lane.handle.name, lane.name) == ("beta", "beta/straight")
    assert calls("open", "register", "connect") == ["beta open", "beta register", "beta connect"]
    assert LEASES == ["u1"]
    assert "overlapped" in str(pair.times)


def test_an_engine_behind_one_that_worked_is_neither_opened_nor_awaited(pair: Pair) -> None:
    hangs = threading.Event()
    Alpha.script["open"] = lambda: hangs.wait(20) and None
    try:
        engines = pair.engines("gamma", "alpha")
        engines.start_opening()
        engines.await_one()
        lane = pair.connect(engines, pair.remote("alpha", "gamma"))
        assert lane.handle.name == "gamma"
        assert "alpha connect" not in CALLS
    finally:
        hangs.set()


def test_engines_that_only_one_side_has_are_passed_over(pair: Pair) -> None:
    lane = pair.connect(pair.engines("alpha", "beta"), pair.remote("pigeon", "beta", "memory"))
    assert lane.handle.name == "beta"
    assert "alpha open" not in CALLS


def test_a_seed_without_a_common_engine_is_not_to_blame_and_another_may_have_one(pair: Pair) -> None:
    """The fingerprint says nothing of rfork_engine: receivers with other settings must not exclude a sound seed."""
    with pytest.raises(SeedError, match=r"engine pigeon, memory, this worker with alpha, beta; ") as caught:
        pair.connect(pair.engines("alpha", "beta"), pair.remote("pigeon", "memory"))
    assert (caught.value.retry_elsewhere, caught.value.side) == (True, "receiver")
    assert CALLS == []


def test_a_manifest_of_an_older_seed_has_the_one_engine_that_it_names(pair: Pair) -> None:
    lane = pair.connect(pair.engines("alpha", "beta"), pair.remote("beta"))
    assert lane.handle.name == "beta"


# --- refusals and failures -------------------------------------------------------------------------------------------


def test_a_refused_lane_is_followed_by_the_next_and_logged_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Alpha.script["connect"] = raises(LANE)
    lane = pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha", "beta"))
    assert lane.handle.name == "beta"
    told = [record for record in caplog.records if "the seed is elsewhere; move it" in record.getMessage()]
    assert [(record.levelname, "10.0.0.1:7000/0" in record.getMessage()) for record in told] == [("INFO", True)]


def test_an_obstacle_that_is_known_costs_no_opening(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Alpha.obstacle = "the seed is on another host"
    lane = pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha", "beta"))
    assert lane.handle.name == "beta"
    assert calls("open") == ["beta open"]
    assert sum("the seed is on another host" in record.getMessage() for record in caplog.records) == 1


def test_an_offer_is_checked_without_opening_an_engine(pair: Pair) -> None:
    """Before the model is built for it."""
    engines = pair.engines("alpha", "beta")
    lanes.check_offer(engines, pair.remote("beta", "pigeon"), "s")
    Alpha.obstacle = Beta.obstacle = "another host"
    for offers, reason in (("pigeon",), "in common"), (("alpha", "beta"), "another host.*another host"):
        with pytest.raises(ForkError, match=reason) as caught:
            lanes.check_offer(engines, pair.remote(*offers), "s")
        assert caught.value.retry_elsewhere
    Beta.obstacle = None
    lanes.check_offer(engines, pair.remote("alpha", "beta"), "s")
    assert calls("open", "register", "connect") == []


@pytest.mark.parametrize("step", ["open", "register", "connect"])
@pytest.mark.parametrize("error", [EngineError("alpha", "connect", "no"), OSError("gone"), SystemExit("native")])
def test_whatever_an_engine_raises_the_next_is_tried(pair: Pair, step: str, error: BaseException) -> None:
    Alpha.script[step] = raises(error)
    assert pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha", "beta")).handle.name == "beta"


def test_a_lane_that_cannot_be_named_is_not_used(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Alpha, "lane", lambda self, endpoint: {}[endpoint])
    assert pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha", "beta")).handle.name == "beta"


def test_a_lane_obstacle_that_raises_is_an_obstacle(pair: Pair) -> None:
    Alpha.script["obstacle"] = raises(ZeroDivisionError("by nought"))
    assert pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha", "beta")).handle.name == "beta"
    with pytest.raises(EngineError, match="lane_obstacle raised ZeroDivisionError"):
        pair.connect(pair.engines("alpha"), pair.remote("alpha"))


def test_a_seed_whose_endpoint_is_damaged_is_blamed_before_its_engine_is_opened(pair: Pair) -> None:
    error = EngineError("alpha", "connect", "not an endpoint", retry_elsewhere=True, side="seed")
    Alpha.script["obstacle"] = raises(error)
    assert pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha", "beta")).handle.name == "beta"
    for refused in (pair.connect, lambda engines, remote: lanes.check_offer(engines, remote, "the seed")):
        with pytest.raises(EngineError) as caught:
            refused(pair.engines("alpha"), pair.remote("alpha"))
        assert caught.value is error
    assert "alpha open" not in CALLS


def test_the_only_lanes_error_is_the_engines_own(pair: Pair) -> None:
    error = EngineError("alpha", "connect", "the process is gone", retry_elsewhere=True, side="seed")
    Alpha.script["connect"] = raises(error)
    with pytest.raises(EngineError) as caught:
        pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha"))
    assert caught.value is error


@pytest.mark.parametrize("step", ["open", "register"])
@pytest.mark.parametrize(("order", "elsewhere"), [(("beta", "alpha"), True), (("alpha",), False)])
def test_a_seed_with_another_engine_may_do_where_the_only_common_one_fails_here(
    pair: Pair, step: str, order: tuple[str, ...], elsewhere: bool
) -> None:
    Alpha.script[step] = raises(EngineError("alpha", step, "memlock is 64 KiB"))
    with pytest.raises(EngineError, match="memlock") as caught:
        pair.connect(pair.engines(*order), pair.remote("alpha"))
    assert (caught.value.retry_elsewhere, caught.value.side) == (elsewhere, "receiver")


def test_no_other_seed_is_tried_for_an_engine_that_did_not_open(pair: Pair) -> None:
    for engine in (Alpha, Beta):
        engine.script["open"] = raises(EngineError(engine.name, "open", "no"))
    engines = pair.engines("beta", "alpha")
    with pytest.raises(EngineError):
        engines.await_one()
    with pytest.raises(EngineError) as caught:
        pair.connect(engines, pair.remote("alpha"))
    assert not caught.value.retry_elsewhere


def test_an_offer_of_engines_that_did_not_open_is_refused(pair: Pair) -> None:
    """Before the model is built for it."""
    Alpha.script["open"] = raises(EngineUnavailable("alpha", "there is no wheel", hint="install it"))
    engines = pair.engines("gamma", "alpha")
    engines.await_one()
    with pytest.raises(EngineError):
        engines.offered_by(pair.remote("alpha"))[0].handle.opened()
    with pytest.raises(EngineError, match="no wheel") as caught:
        lanes.check_offer(engines, pair.remote("alpha"), "s")
    assert caught.value.retry_elsewhere
    lanes.check_offer(engines, pair.remote("alpha", "gamma"), "s")


@pytest.mark.parametrize(("elsewhere", "side"), [(True, "seed"), (False, "unknown")])
def test_the_error_of_all_lanes_names_each_and_whether_another_seed_may_do(
    pair: Pair, elsewhere: bool, side: Any
) -> None:
    Alpha.script["connect"] = raises(EngineError("alpha", "connect", "first", retry_elsewhere=elsewhere, side=side))
    Beta.script["register"] = raises(EngineError("beta", "register", "second", side=side))
    with pytest.raises(EngineError, match=r"alpha: connect failed: first.*beta: register failed: second") as caught:
        pair.connect(pair.engines("alpha", "beta"), pair.remote("beta", "alpha"))
    assert (caught.value.retry_elsewhere, caught.value.side) == (elsewhere, side)
    assert not caught.value.in_flight


def test_bytes_that_may_arrive_forbid_another_lane_and_another_seed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(engine_handle, "_quarantine", kept)
    late = EngineError("alpha", "connect", "late", in_flight=True, retry_elsewhere=True)
    Alpha.script["connect"], Alpha.script["close"] = raises(late), raises(late)
    engines = pair.engines("alpha", "beta")
    with pytest.raises(EngineError) as caught:
        pair.connect(engines, pair.remote("alpha", "beta"))
    assert (caught.value.in_flight, caught.value.retry_elsewhere) == (True, False)
    assert "beta connect" not in CALLS
    assert [(engine.name, memory) for engine, memory in kept] == [("alpha", pair.buffer)]


def test_a_registration_that_does_not_end_in_time_leaves_the_other_lanes(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read before a lane is chosen, so no byte can arrive."""
    kept: list[Any] = []
    monkeypatch.setattr(engine_handle, "_quarantine", kept)
    late = EngineError("alpha", "register", "the call did not return in time", code="timeout", in_flight=True)
    Alpha.script["register"], Alpha.script["close"] = raises(late), raises(late)
    engines = pair.engines("alpha", "beta")
    assert pair.connect(engines, pair.remote("alpha", "beta")).handle.name == "beta"
    deadline = time.monotonic() + 10
    while not kept:  # it is closed in the background
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [(engine.name, memory) for engine, memory in kept] == [("alpha", pair.buffer)]


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["register", "connect"])
def test_a_call_that_hangs_costs_its_engine_and_the_next_is_tried(
    pair: Pair, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_handle, "GRACE_S", 0.1)
    ends = threading.Event()
    Alpha.script[step] = lambda: ends.wait(20) and None
    Alpha.script["close"] = lambda: ends.wait(20) and None  # as with a lock that the call holds
    engines = pair.engines("alpha", "beta", timeout_s=0.3)
    try:
        started = time.monotonic()
        lane = pair.connect(engines, pair.remote("alpha", "beta"), request_timeout_s=0.3)
        assert lane.handle.name == "beta"
        assert time.monotonic() - started < 5
        with pytest.raises(EngineError, match="given up"):
            engines.offered_by(pair.remote("alpha"))[0].handle.opened()
    finally:
        ends.set()


def test_a_peer_that_cannot_be_reached_does_not_cost_more_with_every_engine(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_handle, "GRACE_S", 0.05)
    ends = threading.Event()
    for engine in (Alpha, Beta, Gamma):
        engine.script["connect"] = lambda: ends.wait(20) and None
    started = time.monotonic()
    try:
        with pytest.raises(EngineError, match="no return within"):
            pair.connect(
                pair.engines("alpha", "beta", "gamma"), pair.remote("alpha", "beta", "gamma"), request_timeout_s=1.0
            )
        assert time.monotonic() - started < lanes.CONNECTION_BOUNDS * 1.0 + 0.8
        assert calls("connect") == ["alpha connect", "beta connect", "gamma connect"]
    finally:
        ends.set()


def test_engines_that_hang_while_they_open_cost_two_bounds_together(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_handle, "GRACE_S", 0.0)
    monkeypatch.setattr(Gamma, "opens_quickly", False)
    ends = threading.Event()
    for engine in (Alpha, Beta, Gamma):
        engine.script["open"] = lambda: ends.wait(20) and None
    engines = pair.engines("alpha", "beta", "gamma", "memory", timeout_s=0.6)
    try:
        started = time.monotonic()
        lane = pair.connect(engines, pair.remote("alpha", "beta", "gamma", "memory"))
        assert lane.handle.name == "memory"
        assert time.monotonic() - started < 2.5 * 0.6
    finally:
        ends.set()


def test_no_lane_is_begun_after_the_forks_time(pair: Pair) -> None:
    over = time.monotonic() + 2.1

    def connect() -> None:
        time.sleep(max(0.0, over - time.monotonic()))
        raises(LANE)()

    Alpha.script["connect"] = connect
    with pytest.raises(ForkError, match=r"rfork_fork_timeout_sec.*the seed is elsewhere"):
        pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha", "beta"), fork_s=2.0)
    assert "beta connect" not in CALLS


# --- lying endpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lie", ["", "memory:1:2:3:4", "{}", "\x00", "memory:" * 10_000, "nixl://elsewhere"])
def test_an_endpoint_that_is_not_the_engines_leads_to_the_next_lane(pair: Pair, lie: str) -> None:
    lane = pair.connect(pair.engines("alpha", "beta"), pair.remote("alpha", "beta", alpha=lie))
    assert lane.handle.name == "beta"
    assert pair.buffer.read(0, NBYTES) == bytes(NBYTES)
