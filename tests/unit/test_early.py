"""Engines are opened before the load: taken by it, or closed, and never on a device that vLLM has not set up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from vllm_rfork.config import parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.errors import ConfigError, EngineError
from vllm_rfork.fork import engine_handle, engine_set
from vllm_rfork.load import early

OPTIONS = {
    "model_url": "m",
    "model_deploy_strategy_name": "s",
    "rfork_scheduler_url": "http://127.0.0.1:1",
    "rfork_engine": "memory",
    "rfork_seed_advertise_host": "127.0.0.1",
}
TIMEOUT_S = parse_config(OPTIONS, {}).settings.rfork_seed_timeout_sec
CONFIG = EngineConfig(device="cpu", host="127.0.0.1", timeout_s=TIMEOUT_S)


THREADS = {"rfork-address", "rfork-early", "rfork-engine", "rfork-preload", "rfork-records"}


class Engine(MemoryEngine):
    """Remembers what happened to it."""

    device_types: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    opens_quickly: ClassVar[bool] = False
    events: ClassVar[list[str]] = []
    preload_fails: ClassVar[bool] = False

    @classmethod
    def preload(cls) -> None:
        Engine.events.append("preloaded")
        if Engine.preload_fails:
            raise EngineError("memory", "open", "a library is missing")

    def open(self, config: EngineConfig) -> None:
        Engine.events.append(f"opened for {config.device}")
        super().open(EngineConfig("cpu"))

    def close(self) -> None:
        Engine.events.append("closed")
        super().close()


@pytest.fixture(autouse=True)
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    Engine.events = []
    Engine.preload_fails = False
    for module in (early, engine_handle, engine_set):
        monkeypatch.setattr(module, "engine_class", lambda name: Engine)
    monkeypatch.setattr(early, "engine_order", lambda setting, device_type: ("memory",))
    yield Engine.events
    early.discard()
    # Late events belong to this test, not to the next one.
    eventually(lambda: not any(thread.name in THREADS for thread in threading.enumerate()))


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < end, Engine.events
        time.sleep(0.005)


def configured(device_type: str = "cpu", **changes: Any) -> None:
    early.configured({**OPTIONS, **changes}, device_type)


def settings(**changes: Any) -> Any:
    return parse_config({**OPTIONS, **changes}, {}).settings


def test_a_load_takes_the_engines_that_are_already_open(events: list[str]) -> None:
    configured()
    eventually(lambda: events == ["opened for cpu"])
    engines = early.take_engines(settings(), ["memory"], CONFIG)
    engines.await_one()
    early.discard()
    assert events == ["opened for cpu"], "neither opened again nor closed"
    engines.close()
    assert events == ["opened for cpu", "closed"]


def test_the_records_of_packages_are_read_before_the_load_and_the_load_waits_for_them(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def read() -> None:
        begun.set()
        assert go_on.wait(30.0)
        events.append("records read")

    monkeypatch.setattr(early.installed, "read_ahead", read)
    configured("cuda")
    assert begun.wait(30.0), "at once, on a thread of its own"
    threading.Timer(0.05, go_on.set).start()
    early.await_records()
    assert "records read" in events


def test_records_that_cannot_be_read_ahead_are_left_to_the_description(
    events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("no such folder")

    monkeypatch.setattr(early.installed, "read_ahead", fail)
    configured("cuda")
    early.await_records()


def test_a_second_load_has_engines_of_its_own(events: list[str]) -> None:
    """The draft's, after the target's."""
    configured()
    first, second = (early.take_engines(settings(), ["memory"], CONFIG) for _ in range(2))
    second.await_one()
    first.await_one()
    assert events == ["opened for cpu"] * 2
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("order", "config"), [(["memory", "other"], CONFIG), (["memory"], EngineConfig(device="cpu", host="127.0.0.2"))]
)
def test_engines_that_the_load_does_not_need_are_closed(
    events: list[str], order: list[str], config: EngineConfig
) -> None:
    configured()
    engines = early.take_engines(settings(), order, config)
    eventually(lambda: events == ["opened for cpu", "closed"])
    assert (list(engines.order), engines.config) == (order, config)


def test_engines_of_a_load_that_never_comes_are_closed(events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "EXPIRES_S", 0.05)
    configured()
    eventually(lambda: events == ["opened for cpu", "closed"])


def test_engines_of_a_load_that_takes_none_are_closed_at_its_end(events: list[str]) -> None:
    configured()
    with pytest.raises(ValueError, match="the load fails"), early.discarded_at_end():
        raise ValueError("the load fails")
    eventually(lambda: events == ["opened for cpu", "closed"])


def test_engines_of_an_earlier_worker_in_this_process_are_closed(events: list[str]) -> None:
    configured()
    eventually(lambda: events == ["opened for cpu"])
    configured()
    eventually(lambda: sorted(events) == ["closed", "opened for cpu", "opened for cpu"])


@pytest.mark.parametrize("preload_fails", [False, True])
def test_an_engine_for_a_device_waits_until_the_device_is_set_up(
    events: list[str], monkeypatch: pytest.MonkeyPatch, preload_fails: bool
) -> None:
    """It may create a context: on another device, or before vLLM has measured the free memory."""
    Engine.preload_fails = preload_fails
    monkeypatch.setattr(early, "device_backend", lambda device: SimpleNamespace(name=f"{device}:3"))
    configured("cuda")
    eventually(lambda: events == ["preloaded"])
    time.sleep(0.05)
    assert events == ["preloaded"]
    early.device_ready(torch.device("cuda"))
    eventually(lambda: events == ["preloaded", "opened for cuda:3"])
    config = EngineConfig(device="cuda:3", host="127.0.0.1", timeout_s=TIMEOUT_S)
    early.take_engines(settings(), ["memory"], config).close()


def test_a_device_that_nobody_prepared_for_is_nothing(events: list[str]) -> None:
    early.device_ready(torch.device("cpu"))
    assert events == []


def test_the_address_is_determined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take a second, which the load then does not wait for; and warnings about it are logged once."""
    asked: list[str] = []

    def host(settings: Any) -> str:
        asked.append(threading.current_thread().name)
        return "127.0.0.1"

    monkeypatch.setattr(early, "advertise_host", host)
    configured()
    assert early.own_address(settings()) == ("127.0.0.1", None)
    assert asked == ["rfork-address"]
    assert early.own_address(settings(rfork_seed_slots=3)) == ("127.0.0.1", None), "other settings: asked again"
    assert len(asked) == 2


def test_an_address_that_cannot_be_resolved_is_reported_to_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def host(settings: Any) -> str:
        raise TimeoutError("the name of the planner cannot be resolved")

    monkeypatch.setattr(early, "advertise_host", host)
    configured()
    found, error = early.own_address(settings())
    assert found is None
    assert "cannot be resolved" in str(error)


def test_wrong_or_missing_settings_prepare_nothing(events: list[str]) -> None:
    with pytest.raises(ConfigError):
        configured(rfork_seed_slots=-1)
    configured(model_url="")
    time.sleep(0.05)
    assert events == []
    assert early.take_engines(settings(), ["memory"], CONFIG).order == ("memory",)
