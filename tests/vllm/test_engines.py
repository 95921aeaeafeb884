"""The chain of the demo on real engines, without servers: A from storage, B from A, A killed, C from B."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LogRecords, Planner, SeedProcess, eventually, extra_for
from tests.vllm.engine_process import load_digested, vllm_config
from vllm_rfork.engines.memory import FAULT_VARIABLE

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("engine", ["nixl", "yuanrong", "collective"])
def test_forks_of_forks_are_the_default_loaders_model(
    engine: str,
    vllm_imported: None,
    fleet_planner: Planner,
    model_a: Path,
    model_a_without_weights: Path,
    default_a: Any,
) -> None:
    planner = fleet_planner
    extra = extra_for(planner.url, model_url=f"chain-{engine}", rfork_engine=engine, rfork_heartbeat_interval_sec=2.0)
    processes: list[SeedProcess] = []

    def started(model: Path) -> SeedProcess:
        process = SeedProcess(model, extra)
        processes.append(process)
        said = process.wait()
        assert said["loaded"] == default_a.before
        assert said["processed"] == default_a.after
        assert said["seeds"], process.log
        eventually(lambda: said["seeds"][0] in planner.seeds(), "it is announced")
        return process

    try:
        a = started(model_a)
        assert "RFork: loaded " in a.log
        b = started(model_a_without_weights)
        assert f"from seed {a.said['seeds'][0]}, engine={engine}" in b.log
        a.process.send_signal(signal.SIGKILL)
        a.process.wait()
        eventually(lambda: a.said["seeds"][0] not in planner.seeds(), "A is granted no more", timeout_s=30)
        c = started(model_a_without_weights)
        assert f"from seed {b.said['seeds'][0]}, engine={engine}" in c.log
        eventually(lambda: planner.leases() == 0, "the leases are released")
    finally:
        for process in processes:
            process.end()


@pytest.mark.usefixtures("no_seeds")
def test_a_worker_forks_by_the_next_engine_if_its_first_one_is_refused(
    vllm_imported: None,
    planner: Planner,
    model_a: Path,
    model_a_without_weights: Path,
    default_a: Any,
    rfork_log: LogRecords,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The seed prefers the other one, and offers both with the same registrations."""
    both = extra_for(planner.url, model_url="two engines", rfork_engine="nixl,memory", rfork_heartbeat_interval_sec=2.0)
    seed = SeedProcess(model_a, both)
    try:
        address = seed.wait()["seeds"][0]
        eventually(lambda: address in planner.seeds(), "it is announced")
        monkeypatch.setenv(FAULT_VARIABLE, "connect_fails")
        extra = {**both, "rfork_engine": "memory,nixl", "rfork_become_seed": False}
        loaded = load_digested(vllm_config(model_a_without_weights, load_format="rfork", extra=extra))
        assert (loaded.before, loaded.after) == (default_a.before, default_a.after)
        eventually(lambda: planner.leases() == 0, "the lease is released")
    finally:
        seed.end()
    assert any(f"from seed {address}, engine=nixl" in line and "lane=nixl/" in line for line in rfork_log.texts())
    refused = [record for record in rfork_log.records if "a fault was asked for" in record.getMessage()]
    assert [(record.levelname, address in record.getMessage()) for record in refused] == [("INFO", True)]
