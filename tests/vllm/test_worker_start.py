"""The two moments of a worker's start that this package observes, on vLLM's own base class."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.vllm.engine_process import vllm_config
from vllm_rfork.plugin import register
from vllm_rfork.vllm_compat import worker_start
from vllm_rfork.vllm_compat.worker_start import observe_worker_start

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_imported")]

FORMATS = {"rfork": ["configured", "device is set up", "device ready"], "auto": ["device is set up"]}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order, with callbacks of this test in the place of the plugin's."""
    from vllm.v1.worker.worker_base import WorkerBase

    register()  # once: the plugin's own observation is back when this test ends
    events: list[str] = []

    def callback(name: str) -> Any:
        def call(*facts: Any) -> None:
            assert facts in [({}, "cpu"), (torch.device("cpu"),)]
            events.append(name)
            raise RuntimeError("preparations never fail a start")

        return call

    monkeypatch.setattr(WorkerBase, "__init__", getattr(WorkerBase.__init__, "__wrapped__", WorkerBase.__init__))
    observe_worker_start("rfork", callback("configured"), callback("device ready"))
    observed = WorkerBase.__init__
    observe_worker_start("rfork", callback("again"), callback("again"))
    assert WorkerBase.__init__ is observed, "idempotent"
    return events


def started(events: list[str], config: Any) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.worker_base import WorkerBase

    class Worker(WorkerBase):  # type: ignore[misc]
        def init_device(self) -> str:
            events.append("device is set up")
            return "its result"

    with set_current_vllm_config(config):
        worker = Worker(config, 0, 0, "tcp://127.0.0.1:1")
    assert worker.init_device() == "its result"
    assert "init_device" not in vars(worker), "the class's own again"
    return worker


@pytest.mark.parametrize("load_format", FORMATS)
def test_the_configuration_comes_before_the_device_and_errors_change_nothing(
    events: list[str], model_a: Any, load_format: str
) -> None:
    worker = started(events, vllm_config(model_a, load_format=load_format))
    assert events == FORMATS[load_format]
    worker.init_device()
    assert events == [*FORMATS[load_format], "device is set up"], "observed once"


def test_the_plugin_observes_every_worker() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    register()
    assert hasattr(WorkerBase.__init__, worker_start._MARK)


def test_a_worker_of_a_vllm_that_differs_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its load format is."""
    from vllm.v1.worker import worker_base

    class Worker:
        def __init__(self, vllm_config: Any) -> None:
            self.vllm_config = vllm_config

    def never(*facts: Any) -> None:
        raise AssertionError(facts)

    monkeypatch.setattr(worker_base, "WorkerBase", Worker)
    observe_worker_start("rfork", never, never)
    assert hasattr(Worker.__init__, worker_start._MARK)
    Worker(None)
    monkeypatch.delattr(worker_base, "WorkerBase")
    observe_worker_start("rfork", never, never)
