"""A seed with several engines in this process: which it opens, offers, closes and opens again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.flow.memory_seed import NBYTES, contents, digest_of, manifest_of
from tests.lane_engines import CALLS, Alpha, Beta, raises, recorded
from vllm_rfork.clients import PlannerClient, SeedClient
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.errors import EngineError, EngineUnavailable
from vllm_rfork.fork import engine_handle, engine_set
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.messages import CacheResults
from vllm_rfork.net.credentials import Credentials, Options
from vllm_rfork.net.event_loop import background
from vllm_rfork.seeding.engines import SeedEngines
from vllm_rfork.seeding.manager import SeedManager
from vllm_rfork.seeding.publication import Publication, SeedConfig
from vllm_rfork.seeding.slot import Slot, SlotState
from vllm_rfork.selftest.buffers import Buffer
from vllm_rfork.startup import report

__all__ = ["recorded"]

REASON = "weights are updated"
WITHIN_S = 60.0
CONFIG = SeedConfig(
    planner_url="http://127.0.0.1:9",  # nobody: announcements are tried again in the background
    credentials=Credentials(Options()),
    bind_host="127.0.0.1",
    advertise_host="127.0.0.1",
    port=0,
    rank=0,
    request_timeout_s=2.0,
    ready_timeout_s=10.0,
    heartbeat_interval_s=60.0,
)


class Tensors:
    """The bytes of one buffer, at the same place after every change."""

    recoverable = True

    def __init__(self) -> None:
        self.buffer = Buffer("cpu", NBYTES)
        self.buffer.write(0, contents())
        self.manifest = manifest_of(self.buffer, digest_of(self.buffer))
        self.keep: Any = self.buffer

    def recheck(self) -> None: ...
    def relocate(self) -> Tensors:
        return self

    def release(self) -> None: ...


class Worker:
    """A worker that publishes one model."""

    def __init__(self, *order: str, timeout_s: float = 10.0) -> None:
        self.manager = SeedManager()
        self.engines = EngineSet(order, EngineConfig(device="cpu", timeout_s=timeout_s), named=False)
        intent = SimpleNamespace(stop_renewing=lambda: None, withdraw=lambda: None, id="")
        self.publication = Publication(
            role="target",
            config=CONFIG,
            tensors=Tensors(),
            engines=self.engines,
            intent=cast("Any", intent),
            checkpoint=lambda: None,
            set_device=lambda: None,
            captures_graphs=False,
        )

    def publish(self) -> Slot:
        self.manager.publish(self.publication)
        slot = self.manager.slots[-1]
        self.settle(slot)
        return slot

    def settle(self, slot: Slot) -> None:
        assert slot.thread is not None
        slot.thread.join(WITHIN_S)
        assert not slot.thread.is_alive()

    def manifest(self) -> Manifest:
        (seed,) = self.manager.seeds()
        assert seed.address is not None
        client = SeedClient(request_timeout_s=5.0, credentials=CONFIG.credentials)
        call = client.manifest(seed.address, seed.manifest.seed_key, seed.manifest.fingerprint)
        return background().call(call, WITHIN_S)


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def worker(*order: str, **options: Any) -> Worker:
        started.append(Worker(*order, **options))
        return started[-1]

    yield worker
    for each in started:
        each.manager.withdraw("the test is over", last=True)
        each.engines.close()


def names(manifest: Manifest) -> list[str]:
    return [each.engine for each in manifest.endpoints]


def wait_for(event: threading.Event) -> None:
    event.wait(WITHIN_S)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("recorded")
def test_a_seed_opens_what_the_load_did_not_need_and_its_line_names_all(
    start: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    worker = start("alpha", "memory", "beta")
    assert worker.publish().state is SlotState.SERVING
    assert names(worker.manifest()) == ["memory", "alpha", "beta"]
    (line,) = [text for record in caplog.records if "ready in" in (text := record.getMessage())]
    assert f" offers {NBYTES} bytes (0.00 GB)" in line
    assert "engines=alpha,memory,beta" in line
    assert caplog.text.count("is not offered") == 0


@pytest.mark.usefixtures("recorded")
def test_a_suspended_seed_closes_all_and_returns_with_fresh_engines(start: Callable[..., Worker]) -> None:
    worker = start("alpha", "beta")
    slot = worker.publish()
    before = worker.manifest()
    worker.manager.withdraw(REASON, last=False)
    assert slot.state is SlotState.SUSPENDED
    assert sorted(call for call in CALLS if call.endswith("close")) == ["alpha close", "beta close"]
    worker.manager.resume()
    worker.settle(slot)
    after = worker.manifest()
    assert [CALLS.count(f"{name} open") for name in ("alpha", "beta")] == [2, 2]
    assert [CALLS.count(f"{name} register") for name in ("alpha", "beta")] == [2, 2]
    assert names(after) == names(before) == ["alpha", "beta"]
    assert after.epoch != before.epoch
    assert not {each.endpoint for each in after.endpoints} & {each.endpoint for each in before.endpoints}
    reader = MemoryEngine()
    reader.open(EngineConfig(device="cpu"))
    try:
        for each in before.endpoints:
            with pytest.raises(EngineError):  # an address of an epoch that is over leads nowhere
                reader.connect(each.endpoint, 5.0)
        for each in after.endpoints:
            reader.connect(each.endpoint, 5.0)
    finally:
        reader.close()


@pytest.mark.usefixtures("recorded")
def test_a_withdrawal_closes_all_engines_though_one_of_them_cannot_be_closed(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[tuple[Any, Any]] = []
    monkeypatch.setattr(engine_handle, "_quarantine", kept)
    worker = start("alpha", "beta")
    slot = worker.publish()
    Alpha.script["close"] = raises(RuntimeError("no"))
    worker.manager.withdraw(REASON, last=False)
    assert sorted(CALLS[-2:]) == ["alpha close", "beta close"]
    assert [(engine.name, memory) for engine, memory in kept] == [("alpha", worker.publication.tensors.keep)]
    del Alpha.script["close"]
    worker.manager.resume()
    worker.settle(slot)
    assert names(worker.manifest()) == ["alpha", "beta"], "a new engine takes the place of the one that is kept"
    kept[0][0].close()


@pytest.mark.usefixtures("recorded")
def test_an_engine_that_opens_late_is_left_out_and_closed_when_it_is_open(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for module in (engine_handle, engine_set):
        monkeypatch.setattr(module, "GRACE_S", 0.0)
    go_on = threading.Event()
    Alpha.script["open"] = lambda: wait_for(go_on)
    worker = start("alpha", "beta", timeout_s=0.5)
    worker.publish()
    assert names(worker.manifest()) == ["beta"]
    assert "engine alpha: open failed: not open after" in caplog.text
    assert "alpha close" not in CALLS
    go_on.set()
    until(lambda: "alpha close" in CALLS)


@pytest.mark.usefixtures("recorded")
def test_a_change_does_not_wait_for_an_engine_that_is_being_opened(start: Callable[..., Worker]) -> None:
    go_on = threading.Event()
    Alpha.script["open"] = lambda: wait_for(go_on)
    worker = start("alpha", "beta", timeout_s=WITHIN_S)
    worker.manager.publish(worker.publication)
    (slot,) = worker.manager.slots
    until(lambda: "alpha open" in CALLS)
    started = time.monotonic()
    worker.manager.withdraw(REASON, last=False)
    assert time.monotonic() - started < 10
    go_on.set()
    worker.settle(slot)
    assert not [call for call in CALLS if call.endswith("register")], "the bytes may have changed"
    until(lambda: {"alpha close", "beta close"} <= set(CALLS))
    worker.manager.resume()
    worker.settle(slot)
    assert names(worker.manifest()) == ["alpha", "beta"]


@pytest.mark.usefixtures("recorded")
def test_a_withdrawal_ends_the_forks_registrations_while_another_engine_opens(start: Callable[..., Worker]) -> None:
    """The worker has forked with alpha; beta, which only the seed needs, hangs."""
    go_on = threading.Event()
    Beta.script["open"] = lambda: wait_for(go_on)
    worker = start("alpha", "beta", timeout_s=WITHIN_S)
    tensors = worker.publication.tensors
    forked = worker.engines._handles["alpha"]
    forked.register(tensors.manifest.regions, tensors.keep, 5.0)
    engine = forked.opened()
    try:
        worker.manager.publish(worker.publication)
        until(lambda: "beta open" in CALLS)
        worker.manager.withdraw(REASON, last=True)
        assert engine.registered_nbytes == 0
    finally:
        go_on.set()


@pytest.mark.usefixtures("recorded")
def test_endpoints_are_made_while_the_seed_may_still_use_the_device(
    start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine of a device exports handles then, and one that is left out waits for its copies."""
    worker = start("alpha")
    off_device: list[bool] = []
    offer = SeedEngines.offer

    def observed(self: SeedEngines, *arguments: Any) -> Manifest:
        off_device.append(worker.manager.slots[0].off_device.is_set())
        return offer(self, *arguments)

    monkeypatch.setattr(SeedEngines, "offer", observed)
    slot = worker.publish()
    assert off_device == [False]
    assert slot.off_device.is_set()


@pytest.mark.usefixtures("recorded")
def test_without_an_engine_there_is_no_seed_and_the_log_has_all_reasons(
    start: Callable[..., Worker], caplog: pytest.LogCaptureFixture
) -> None:
    Alpha.script["open"] = raises(EngineUnavailable("alpha", "no library", hint="install it"))
    Beta.script["open"] = raises(EngineError("beta", "open", "no port is free"))
    worker = start("alpha", "beta")
    worker.manager.publish(worker.publication)
    until(lambda: worker.manager.slots == ())
    (line,) = [text for record in caplog.records if "is not a seed" in (text := record.getMessage())]
    assert "install it" in line
    assert "no port is free" in line


def test_results_of_caches_are_announced_at_once(start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[str] = []

    async def announce(self: PlannerClient, *arguments: Any, caches: str, **options: Any) -> None:
        announced.append(caches)

    monkeypatch.setattr(PlannerClient, "announce", announce)
    worker = start("memory")
    worker.publish()
    until(lambda: announced == [""])
    (seed,) = worker.manager.seeds(WITHIN_S)
    for _ in range(2):  # the same again says nothing new
        report.announce(CacheResults({"triton": "hit"}), seed.manifest.seed_key)
    until(lambda: len(announced) == 2)
    worker.manager.withdraw(REASON, last=True)
    report.announce(CacheResults())
    assert announced == ["", "triton=hit"]
    assert report._Slot.announcing == ()
