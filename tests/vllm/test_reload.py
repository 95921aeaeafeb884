"""vLLM's own ``reload_weights`` with a seed: forked in place, or left to vLLM. ``tests/flow/test_reload.py`` has more.

The runtime layout is allowed on this processor, as in ``test_runtime``. The worker has the methods of vLLM's own, and
one model; the seed has a manager of its own in the same process.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.vllm.conftest import LogRecords, Planner, eventually, extra_for
from tests.vllm.engine_process import digests_of, distributed, load, vllm_config
from tests.vllm.faults import scrambled
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.load import context
from vllm_rfork.load.reload import reloads
from vllm_rfork.seeding.manager import SeedManager, manager
from vllm_rfork.vllm_compat.worker_hooks import withdraw_before_changes

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("runtime_allowed", "no_seeds")]

FORKED = "into the running model"


class Runner:
    """The parts of vLLM's model runner that a reload uses; counts reads of storage."""

    def __init__(self, config: Any, model: nn.Module) -> None:
        self.vllm_config, self.model_config, self.load_config = config, config.model_config, config.load_config
        self.model, self.stored, self.reset = model, 0, list[str]()

    def get_model(self) -> nn.Module:
        return self.model

    def reload_weights(self, *arguments: Any) -> None:
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        self.stored += 1
        iterator, path, in_checkpoint_format = (*arguments, *(None, None, True)[len(arguments) :])
        with distributed(self.vllm_config):
            reload_weights(self.vllm_config, self.model, iterator, path, in_checkpoint_format)

    def reset_mm_cache(self) -> None:
        self.reset.append("mm")

    def reset_lora_state(self) -> None:
        self.reset.append("lora")


def worker_of(config: Any, model: nn.Module) -> Any:
    """A worker whose ``reload_weights`` is vLLM's, hooked for this test."""
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    methods = {
        "__module__": Worker.__module__,
        "reload_weights": inspect.unwrap(Worker.reload_weights),
        "sleep": lambda self, level=1: None,
        "wake_up": lambda self, tags=None: None,
        "apply_model": lambda self, function: function(self.model_runner.model),
    }
    cls = type("Worker", (WorkerBase,), methods)
    withdraw_before_changes(manager(), reloads())
    worker: Any = object.__new__(cls)
    worker.vllm_config, worker.model_runner = config, Runner(config, model)
    return worker


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "KEEPS_LOADED", frozenset())


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> Iterator[SeedManager]:
    """The manager of another worker's seeds."""
    other = SeedManager()
    yield other
    other.withdraw("a test is over", last=True)


def options(planner: Planner, name: str, **more: Any) -> dict[str, Any]:
    return extra_for(planner.url, model_url=name, **more)


def seed_of(seeds: SeedManager, model: Path, extra: dict[str, Any], planner: Planner) -> nn.Module:
    """Another worker's model, once its seed is announced."""
    from vllm.model_executor.layers import rotary_embedding

    from vllm_rfork import loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "manager", lambda: seeds)
        patch.setattr(loader, "withdraw_before_changes", lambda *args: None)
        rotary_embedding._ROPE_DICT.clear()  # two models of one process would share the table
        loaded: nn.Module = load(vllm_config(model, load_format="rfork", extra=extra))
    (seed,) = seeds.seeds(30)
    eventually(lambda: str(seed.address) in planner.seeds(), "the seed is announced")
    return loaded


def started(model: Path, extra: dict[str, Any]) -> Any:
    """A worker that serves ``model``."""
    from vllm.model_executor.layers import rotary_embedding

    rotary_embedding._ROPE_DICT.clear()
    config = vllm_config(model, load_format="rfork", extra=extra)
    return worker_of(config, load(config))


def discard(model: nn.Module) -> None:
    """Overwrite every weight, as the memory is after a sleep of level 2; vLLM brings buffers back."""
    for parameter in model.parameters():
        parameter.data.view(torch.uint8).fill_(0xA5)


def sleeps(worker: Any) -> None:
    worker.sleep(level=2)
    discard(worker.model_runner.model)
    worker.wake_up(tags=["weights"])


def lines(log: LogRecords, text: str) -> list[str]:
    return [line for line in log.texts() if text in line]


def test_after_a_deep_sleep_the_weights_come_from_a_seed_and_the_worker_is_one_again(
    planner: Planner, seeds: SeedManager, model_a: Path, rfork_log: LogRecords
) -> None:
    extra = options(planner, "deep sleep")
    source = seed_of(seeds, model_a, extra, planner)
    worker = started(model_a, extra)
    runner = worker.model_runner
    (own,) = manager().seeds(30)
    places = {name: each.data_ptr() for name, each in runner.model.named_parameters()}
    sleeps(worker)
    assert digests_of(runner.model) != digests_of(source)
    worker.reload_weights()
    assert own.address is None, "withdrawn meanwhile"
    assert digests_of(runner.model) == digests_of(source)
    assert places == {name: each.data_ptr() for name, each in runner.model.named_parameters()}
    assert (runner.stored, runner.reset) == (0, ["lora", "mm"])
    (line,) = lines(rfork_log, FORKED)
    (seed,) = seeds.seeds()
    assert f"from seed {seed.address}" in line
    again = eventually(lambda: [each for each in manager().seeds(30) if each.address], "it is a seed again")
    assert again[0].manifest.epoch != own.manifest.epoch


def test_a_worker_without_files_forks_once_more_what_it_forked(
    planner: Planner, seeds: SeedManager, model_a: Path, model_a_without_weights: Path, rfork_log: LogRecords
) -> None:
    extra = options(planner, "no files")
    source = seed_of(seeds, model_a, extra, planner)
    worker = started(model_a_without_weights, extra)
    sleeps(worker)
    worker.reload_weights(weights_iterator=None, weights_path=None, is_checkpoint_format=True)
    assert digests_of(worker.model_runner.model) == digests_of(source)
    assert len(lines(rfork_log, FORKED)) == 1


def test_new_files_at_the_same_path_are_read_although_a_seed_has_the_old_weights(
    planner: Planner, seeds: SeedManager, model_a: Path, model_b: Path, tmp_path: Path, rfork_log: LogRecords
) -> None:
    extra = options(planner, "new files")
    model = Path(shutil.copytree(model_a, tmp_path / "model"))
    seed_of(seeds, model_a, extra, planner)
    worker = started(model, extra)
    sleeps(worker)
    shutil.copy(model_b / "model.safetensors", model / "model.safetensors")
    worker.reload_weights()
    assert worker.model_runner.stored == 1
    assert digests_of(worker.model_runner.model) == digests_of(load(vllm_config(model_b)))
    assert lines(rfork_log, "the model's files have changed since it was loaded")


def test_a_fork_that_fails_ends_in_the_weights_of_storage(
    planner: Planner, seeds: SeedManager, model_a: Path, rfork_log: LogRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotary embedding's table is in no checkpoint, and storage would not repair it."""
    extra = options(planner, "other bytes")
    source = seed_of(seeds, model_a, extra, planner)
    worker = started(model_a, extra)
    sleeps(worker)
    monkeypatch.setattr(MemoryEngine, "read", scrambled(MemoryEngine.read))
    worker.reload_weights()
    assert digests_of(worker.model_runner.model) == digests_of(source)
    assert worker.model_runner.stored == 1
    (line,) = lines(rfork_log, "weights are reloaded from storage")
    assert "VerificationError" in line
    eventually(lambda: [each for each in manager().seeds(30) if each.address], "it is a seed again")


def asleep(worker: Any, model: Path) -> None:
    worker.sleep(level=2)
    worker.reload_weights()


def by_path(worker: Any, model: Path) -> None:
    worker.reload_weights(None, str(model))


@pytest.mark.parametrize("call", [asleep, by_path])
def test_what_asks_for_other_weights_is_left_to_vllm(
    call: Any, planner: Planner, seeds: SeedManager, model_a: Path, rfork_log: LogRecords
) -> None:
    extra = options(planner, call.__name__)
    seed_of(seeds, model_a, extra, planner)
    worker = started(model_a, extra)
    call(worker, model_a)
    assert worker.model_runner.stored == 1
    assert not lines(rfork_log, FORKED)
