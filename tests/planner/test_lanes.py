"""Forks by engine and lane, in metrics and history."""

from __future__ import annotations

import json
import re

from tests.planner.test_api import planner
from vllm_rfork.engines.nixl.peer import Lane
from vllm_rfork.engines.registry import ENGINES, engine_class
from vllm_rfork.messages.lanes import LANES, lane_labels


async def test_forks_are_counted_by_engine_and_lane() -> None:
    reports = (
        {"RFORK-RESULT": "ok", "RFORK-NBYTES": "3000", "RFORK-SECONDS": "1.5", "RFORK-LANE": "nixl/rdma"},
        {"RFORK-RESULT": "ok", "RFORK-NBYTES": "5000", "RFORK-SECONDS": "0.5", "RFORK-LANE": "nixl/rdma"},
        {"RFORK-RESULT": "ok", "RFORK-NBYTES": "7000", "RFORK-LANE": "nixl/rdma"},
        {"RFORK-RESULT": "failed", "RFORK-CAUSE": "EngineError", "RFORK-LANE": "cuda_ipc"},
        {"RFORK-RESULT": "failed", "RFORK-CAUSE": "PlannerError"},
    )
    async with planner() as client:
        await client.add(5000)
        for report in reports:
            assert await client.status("POST", "/put_seed", **await client.lease(), **report) == 200
        page = (await client.call("GET", "/metrics"))[2]
        history = json.loads((await client.call("GET", "/debug/snapshot"))[2])["history"]
    assert 'rfork_planner_lane_forks_total{engine="nixl",lane="nixl/rdma",result="ok"} 3.0' in page
    assert 'rfork_planner_lane_forks_total{engine="cuda_ipc",lane="cuda_ipc",result="failed"} 1.0' in page
    # The fork without seconds counts in neither, so that their ratio is the lane's rate.
    assert 'rfork_planner_lane_bytes_total{engine="nixl",lane="nixl/rdma"} 8000.0' in page
    assert 'rfork_planner_lane_seconds_total{engine="nixl",lane="nixl/rdma"} 2.0' in page
    assert "rfork_planner_fork_bytes_total 15000.0" in page
    assert [each["lane"] for each in history] == ["", "cuda_ipc", "nixl/rdma", "nixl/rdma", "nixl/rdma"]


async def test_lanes_that_receivers_make_up_share_their_series() -> None:
    async with planner() as client:
        await client.add(5000)
        for number in range(4):
            for lane in (f"made{number}up/x", f"nixl/made{number}up", f"made{number}up", f"nixl/rdma/made{number}up"):
                told = {"RFORK-RESULT": "ok", "RFORK-NBYTES": "1", "RFORK-SECONDS": "1", "RFORK-LANE": lane}
                assert await client.status("POST", "/put_seed", **await client.lease(), **told) == 200
        page = (await client.call("GET", "/metrics"))[2]
    assert not re.search(r"made\d", page)
    assert 'rfork_planner_lane_forks_total{engine="(other)",lane="(other)",result="ok"} 8.0' in page
    assert 'rfork_planner_lane_forks_total{engine="nixl",lane="(other)",result="ok"} 8.0' in page


def test_every_engine_of_this_package_has_series_of_its_own() -> None:
    assert set(ENGINES) == set(LANES)
    assert {f"nixl/{lane.short}" for lane in Lane} <= LANES["nixl"]
    for name in ENGINES:  # each adapter lists its lanes
        assert set(re.findall(rf"``({name}/\w+)``", engine_class(name).lane.__doc__ or "")) <= LANES[name]
    assert all(lane_labels(lane) == (engine, lane) for engine, lanes in LANES.items() for lane in lanes)
