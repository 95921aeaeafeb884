"""The copies that a read makes from a mapped seed, and the obstacles that are found before one is mapped."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.cuda_ipc import obstacles
from vllm_rfork.engines.cuda_ipc.driver import HANDLE_NBYTES
from vllm_rfork.engines.cuda_ipc.endpoint import Allocation, Endpoint, boot_id, encode
from vllm_rfork.engines.cuda_ipc.engine import CudaIpcEngine
from vllm_rfork.engines.cuda_ipc.peer import MappedPeer
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.segments import Segment

GPU = uuid.UUID(int=77)
HANDLE = bytes(HANDLE_NBYTES)


def endpoint(boot: str = "here") -> Endpoint:
    """Two allocations of 1000 bytes, next to each other: one region fills the first, two lie in the second."""
    return Endpoint(
        boot=boot,
        device=GPU.bytes,
        identity=bytes(16),
        page=Allocation(100, 16, HANDLE),
        allocations=[Allocation(1000, 1000, HANDLE), Allocation(2000, 1000, HANDLE)],
        regions=[(1000, 1000), (2000, 400), (2400, 600)],
    )


@pytest.fixture
def peer() -> MappedPeer:
    return MappedPeer(endpoint(), 1, [501_000, 702_000])


def test_segments_that_continue_each_other_are_one_copy(peer: MappedPeer) -> None:
    segments = [Segment(10, 1000, 100), Segment(110, 1100, 50), Segment(160, 1150, 5)]
    assert peer.copies(segments, set()) == [(10, 501_000, 155)]


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(Segment(111, 1100, 50), id="a gap here"),
        pytest.param(Segment(110, 1101, 50), id="a gap at the seed"),
        pytest.param(Segment(10, 1000, 100), id="the same again"),
    ],
)
def test_segments_with_a_gap_are_separate_copies(peer: MappedPeer, second: Segment) -> None:
    copies = peer.copies([Segment(10, 1000, 100), second], set())
    assert copies == [(10, 501_000, 100), (second.local, second.remote + 500_000, second.nbytes)]


def test_no_copy_reaches_from_one_allocation_into_the_next(peer: MappedPeer) -> None:
    """On either side: both have allocations next to each other, which the driver does not copy across."""
    here = peer.copies([Segment(10, 1000, 100), Segment(110, 1100, 50)], {10, 110})
    assert here == [(10, 501_000, 100), (110, 501_100, 50)]
    there = peer.copies([Segment(10, 1900, 100), Segment(110, 2000, 50)], set())
    assert there == [(10, 501_900, 100), (110, 702_000, 50)]


@pytest.mark.parametrize(
    "bad", [(999, 10), (1990, 11), (2399, 2), (2999, 2), (5000, 1), (1000, 0), (1000, -1), (1100, -50)]
)
def test_a_segment_outside_the_regions_is_refused_after_good_ones(peer: MappedPeer, bad: tuple[int, int]) -> None:
    with pytest.raises(EngineError, match="one registered region"):
        peer.copies([Segment(10, 1000, 100), Segment(110, *bad)], set())


def test_a_seed_on_another_host_is_an_obstacle_with_a_remedy() -> None:
    config = EngineConfig(device="cuda:0")
    reason = CudaIpcEngine.lane_obstacle(encode(endpoint("another kernel")), config)
    assert reason is not None
    assert "another host" in reason
    assert "collective" in reason
    assert CudaIpcEngine.lane_obstacle(encode(endpoint(boot_id())), config) is None


@pytest.mark.parametrize("text", ["", "{}", "[" * 10_000, "\udcff", "x" * (17 << 20)])
def test_an_unreadable_endpoint_is_an_obstacle(text: str) -> None:
    assert CudaIpcEngine.lane_obstacle(text, EngineConfig(device="cuda:0"))


def test_a_gpu_without_its_device_file_is_an_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, files = tmp_path / "gpus", tmp_path / "dev"
    (gpus / "0000:1b:00.0").mkdir(parents=True)
    (gpus / "0000:1b:00.0" / "information").write_text(f"Model: \t X\nGPU UUID: \t GPU-{GPU}\nDevice Minor: \t 3\n")
    files.mkdir()
    monkeypatch.setattr(obstacles, "GPUS", gpus)
    monkeypatch.setattr(obstacles, "DEVICE_FILES", files)
    (files / "nvidia0").touch()
    reason = obstacles.obstacle(endpoint(), "here")
    assert reason is not None
    assert "nvidia3 is missing" in reason
    (files / "nvidia3").touch()
    assert obstacles.obstacle(endpoint(), "here") is None


def test_a_gpu_that_the_driver_does_not_list_is_left_to_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's list may be incomplete although its device files are there."""
    monkeypatch.setattr(obstacles, "GPUS", tmp_path)
    assert obstacles.obstacle(endpoint(), "here") is None
