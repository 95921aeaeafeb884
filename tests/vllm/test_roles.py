"""Roles of KV transfer in real configurations of vLLM: a worker forks from a seed of its own role, and of no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LogRecords, Planner, eventually, extra_for
from tests.vllm.engine_process import digests_of, load, vllm_config
from vllm_rfork.seeding.manager import manager

pytestmark = pytest.mark.vllm


def configured(model: Path, planner: Planner, role: str, **options: Any) -> Any:
    """As ``vllm serve --kv-transfer-config`` makes it, with the connector that vLLM ships as an example."""
    extra = extra_for(planner.url, model_deploy_strategy_name="roles", **options)
    changes: dict[str, Any] = {}
    if role != "kv_both":
        changes["kv_transfer_config"] = {"kv_connector": "ExampleConnector", "kv_role": role}
    return vllm_config(model, load_format="rfork", extra=extra, **changes)


def receiver(planner: Planner, model: Path, role: str) -> Any:
    return configured(model, planner, role, rfork_become_seed=False)


@pytest.fixture
def producer(planner: Planner, model_a: Path) -> Iterator[Any]:
    """The model of a producer that is a seed in this process."""
    loaded = load(configured(model_a, planner, "kv_producer"))
    (seed,) = [each for each in manager().seeds(30) if "$roles$" in each.manifest.seed_key]
    assert seed.manifest.seed_key == "tiny$roles$kv_producer$0$0"
    eventually(lambda: str(seed.address) in planner.seeds(), "the seed is announced")
    yield loaded
    manager().withdraw("test is over", last=True)


def test_a_worker_forks_from_its_own_role_and_the_planner_knows_nothing_for_another(
    producer: Any, planner: Planner, model_a: Path, model_a_without_weights: Path, rfork_log: LogRecords
) -> None:
    forked = load(receiver(planner, model_a_without_weights, "kv_producer"))
    assert len([line for line in rfork_log.texts() if line.startswith("RFork: forked ")]) == 1
    assert digests_of(forked) == digests_of(producer)
    for role in ("kv_consumer", "kv_both"):
        rfork_log.records.clear()
        load(receiver(planner, model_a, role))
        said = rfork_log.texts()
        assert [line for line in said if f"seed key tiny$roles${role}$0$0" in line], said
        assert [line for line in said if "no free seed" in line.lower() or "loading from storage" in line], said
        assert not [line for line in said if line.startswith("RFork: forked ")]
        assert not rfork_log.warnings, "a cold start is not a failure"
    eventually(lambda: planner.leases() == 0, "the lease is released")
