"""Hooks on a start: which are installed, and that none of them can fail it."""

from __future__ import annotations

import logging
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_rfork.caches.safe.startup_plan import CarriedPlan, DeviceMemory
from vllm_rfork.load.consensus import Consensus
from vllm_rfork.vllm_compat import start_up
from vllm_rfork.vllm_compat.rank_groups import RankGroup
from vllm_rfork.vllm_compat.start_up import Hook, install_hooks, plan_hooks, plans, warm_up
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import CacheListener, listen, listener


class Warm:
    """A listener that counts the ends of warm-ups."""

    def __init__(self) -> None:
        self.count = 0

    def warm(self) -> None:
        self.count += 1


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("a_hook_of_a_test")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(start_up, "HOOKS", (Hook("triton", "code", made.__name__), Hook("plan", "safe", "no.such")))
    return made


@pytest.fixture(autouse=True)
def nothing_listens() -> Iterator[None]:
    yield
    listen(None)


def test_a_hook_that_this_vllm_lacks_costs_one_line_and_not_the_start(
    module: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def install() -> None:
        raise AttributeError("module 'triton' has no attribute 'cache'")

    module.install = install  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO):
        install_hooks("code")
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "triton is not supported with this vLLM" in caplog.messages[0]
    assert "plan is not supported with this vLLM" in caplog.messages[1]


def test_hooks_for_code_are_not_installed_at_level_safe(module: types.ModuleType) -> None:
    installed = []
    module.install = lambda: installed.append(1)  # type: ignore[attr-defined]
    install_hooks("safe")
    assert not installed
    install_hooks("code")
    assert installed


def test_the_outermost_frame_of_a_hook_names_what_failed(caplog: pytest.LogCaptureFixture) -> None:
    with guarded("torch_aot"):
        raise KeyError("rank")
    assert "torch_aot was left to vLLM because of KeyError: 'rank'" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


def test_the_end_of_warm_up_is_reported_after_the_workers_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class WorkerBase:
        def compile_or_warm_up_model(self) -> float:
            assert counting.count == 0
            return 1.5

    class Worker(WorkerBase):
        pass

    base = types.ModuleType("worker_base")
    base.WorkerBase = WorkerBase  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", base)
    warm_up.install()
    warm_up.install()
    counting = Warm()
    listen(counting)  # type: ignore[arg-type]
    assert Worker().compile_or_warm_up_model() == 1.5
    assert counting.count == 1


def test_without_a_listener_nothing_is_carried() -> None:
    nothing: CacheListener = listener()
    assert nothing.agree("plan", None) == "this process carries no caches"
    nothing.warm()


class Plan:
    """The plan of a rank of this package's, or none beside vLLM's own file."""

    fitting_nbytes, memory, applied = 0, None, None

    def __init__(self, recorded: bool) -> None:
        self.recorded = recorded

    def obstacle(self) -> str | None:
        if self.recorded:
            self.applied = SimpleNamespace(cache_nbytes=100)
            return None
        return "the plan of an earlier start on this host does not state what it follows from"

    def fitted(self, cache_config: Any, value: int) -> int:
        return value


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("described", [True, False])
def test_a_rank_with_the_users_own_plan_votes_with_the_others(
    described: bool, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's measurement has collectives: a rank that measures alone waits for good."""
    store, local, threads = torch.distributed.HashStore(), threading.local(), list[threading.Thread]()
    votes: dict[int, list[str]] = {0: [], 1: []}
    measured: list[int] = []

    def plan_of(worker: Any) -> Plan:
        if worker.rank and not described:
            raise KeyError("a key that vLLM cannot compute")
        return Plan(recorded=not worker.rank)

    patched = {
        "StartUpPlan": SimpleNamespace(of=plan_of),
        "_enabled": lambda: True,
        "listens": lambda: True,
        "listener": lambda: SimpleNamespace(agree=local.agree),
        "reset_peak": lambda: None,
        "beside_cache_nbytes": lambda *given: 0,
        "capped": lambda *given: 100 if fits else 1,
        "needed_nbytes": lambda *given: 1,
    }
    for name, stand_in in patched.items():
        monkeypatch.setattr(plan_hooks, name, stand_in)

    def vllms_file(worker: Any) -> None:
        worker.cache_config.kv_cache_memory_bytes = 100

    apply = plan_hooks._applying(vllms_file, user_decided=True)

    def determine(worker: Any) -> int:
        apply(worker)
        if worker.cache_config.kv_cache_memory_bytes is None:
            measured.append(worker.rank)
        return 100

    def run(rank: int) -> None:
        consensus = Consensus(RankGroup(rank, (0, 1), "g"), connect=lambda: store)

        def agree(stage: str, obstacle: str | None) -> str | None:
            votes[rank].append(stage)
            return consensus.decide(stage, obstacle, 5.0)

        local.agree = agree
        cache_config = SimpleNamespace(kv_cache_memory_bytes=None)
        plan_hooks._fitting(determine)(SimpleNamespace(rank=rank, cache_config=cache_config))

    threads.extend(threading.Thread(target=run, args=(rank,)) for rank in (0, 1))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert votes == {rank: [plan_hooks.FOUND, plan_hooks.FITS] for rank in (0, 1)}
    assert sorted(measured) == ([] if fits else [0, 1])


def test_a_method_that_was_not_called_is_observed_again() -> None:
    """An applied plan spares the measurement of graphs, which expert parallelism of another size may need later."""
    seen: list[int] = []

    class Runner:
        def profile_cudagraph_memory(self) -> int:
            return 5

    runner = Runner()
    for _ in range(2):
        plans._observe(runner, "profile_cudagraph_memory", lambda result, seconds: seen.append(result))
    assert [runner.profile_cudagraph_memory() for _ in range(2)] == [5, 5]
    assert seen == [5, 5]


def test_a_plan_whose_record_cannot_be_written_is_applied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk may be full after the profiling run; the cache that fits is known by then."""
    memory = DeviceMemory(total_nbytes=1000, free_nbytes=900, requested_nbytes=800, weights_nbytes=100)
    plan = plans.StartUpPlan(root=tmp_path / "a file", rank=0, fingerprint="0" * 16, memory=memory, settings={})
    (tmp_path / "a file").write_text("where a directory is needed")
    plan.applied = CarriedPlan(cache_nbytes=500, graphs_nbytes=0, memory=memory, settings={})
    plan.fitting_nbytes = 400
    cache_config = SimpleNamespace(kv_cache_memory_bytes=500)
    with caplog.at_level(logging.WARNING):
        assert plan.fitted(cache_config, 490) == 390
    assert cache_config.kv_cache_memory_bytes == 400
    assert "startup_plan was left to vLLM because of CacheError" in caplog.text
