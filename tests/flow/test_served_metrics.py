"""What the planner adds for a worker's metrics: what its seed has served, and what a fork saves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.flow.memory_seed import NBYTES, contents, seed_of, session_of
from tests.flow.test_fork_reports import target_of
from vllm_rfork.config import Settings, parse_config
from vllm_rfork.errors import NoSeedAvailable
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.selftest.buffers import Buffer
from zoo.planner import FleetPlanner, eventually


@pytest.fixture
def planner() -> Iterator[FleetPlanner]:
    running = FleetPlanner()
    yield running
    running.stop()


def settings(planner: FleetPlanner, **more: Any) -> Settings:
    options = {
        "model_url": "/models/q",
        "model_deploy_strategy_name": "prod",
        "rfork_scheduler_url": planner.url,
        "rfork_seed_bind_host": "127.0.0.1",
        "rfork_seed_advertise_host": "127.0.0.1",
        "rfork_heartbeat_interval_sec": 1.0,
        "rfork_request_timeout_sec": 30.0,  # on a busy machine
        **more,
    }
    return parse_config(options, {}).settings


def test_a_seed_counts_what_receivers_report_and_a_fork_what_it_saves(
    planner: FleetPlanner, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[int, int]] = []
    monkeypatch.setattr(metrics, "served", lambda forks, nbytes: served.append((forks, nbytes)))
    first = session_of(settings(planner))
    began = time.monotonic()
    with pytest.raises(NoSeedAvailable):
        first.reserve("f1")
    buffer = Buffer("cpu", NBYTES)
    buffer.write(0, contents())
    seed = seed_of(first.settings, first, buffer)
    try:
        seed.start()
        loaded_s = time.monotonic() - began
        eventually(planner.seeds, "the seed is announced")
        for number in (1, 2):
            receiver = session_of(settings(planner, rfork_become_seed=False))
            receiver.run(target_of(Buffer("cpu", NBYTES)))
            receiver.close()
            assert receiver.storage_s is not None
            assert 0 < receiver.storage_s <= loaded_s + 1, "from the first question to the announcement"
            eventually(
                lambda number=number: (
                    [sum(column) for column in zip(*served, strict=True)] == [number, number * NBYTES]
                ),
                "the planner reports the fork with a heartbeat",
            )
        assert len(served) == 2
    finally:
        seed.withdraw("the test is over")
