"""Each engine predicts the lane to a peer with its own machine's facts, without opening anything."""

from __future__ import annotations

import pytest

from vllm_rfork.engines.base import Place
from vllm_rfork.engines.nixl import peer as nixl
from vllm_rfork.engines.nixl.peer import ALLOW_TCP
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError


@pytest.fixture(autouse=True)
def no_rdma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "rdma_obstacle", lambda: "there is no RDMA device")
    monkeypatch.delenv(ALLOW_TCP, raising=False)


@pytest.mark.parametrize(
    ("engine", "device", "place", "lane"),
    [
        ("nixl", "cpu", "container", "nixl/cma"),
        ("nixl", "cuda", "container", "nixl/cuda_ipc"),
        ("cuda_ipc", "cuda", "container", "cuda_ipc"),
        ("cuda_ipc", "cuda", "host", "cuda_ipc"),
        ("memory", "cpu", "container", "memory"),
        ("yuanrong", "npu", "elsewhere", "yuanrong"),
    ],
)
def test_lanes_that_exist(engine: str, device: str, place: Place, lane: str) -> None:
    assert engine_class(engine).lane_to(place, device) == lane


@pytest.mark.parametrize(
    ("engine", "device", "place", "reason"),
    [
        ("nixl", "cpu", "host", "another pid namespace"),
        ("nixl", "cpu", "elsewhere", "no RDMA device"),
        ("cuda_ipc", "cuda", "elsewhere", "another host"),
        ("memory", "cpu", "host", "another pid namespace"),
    ],
)
def test_lanes_that_do_not_exist_have_a_reason(engine: str, device: str, place: Place, reason: str) -> None:
    with pytest.raises(EngineError, match=reason) as refused:
        engine_class(engine).lane_to(place, device)
    assert refused.value.code == "lane"


def test_rdma_and_permitted_tcp_reach_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_TCP, "1")
    assert engine_class("nixl").lane_to("elsewhere", "cpu") == "nixl/tcp"
    monkeypatch.setattr(nixl, "rdma_obstacle", lambda: None)
    assert engine_class("nixl").lane_to("elsewhere", "cpu") == "nixl/rdma"
    assert engine_class("nixl").lane_to("host", "cuda") == "nixl/rdma", "two pods of one node"
