"""The copies that a read makes from a mapped seed, and the obstacles that are found before one is mapped."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.cuda_ipc import engine as cuda_ipc_engine
from vllm_rfork.engines.cuda_ipc import obstacles
from vllm_rfork.engines.cuda_ipc.driver import HANDLE_NBYTES, NAME
from vllm_rfork.engines.cuda_ipc.endpoint import Allocation, Endpoint, boot_id, encode
from vllm_rfork.engines.cuda_ipc.engine import CudaIpcEngine
from vllm_rfork.engines.cuda_ipc.peer import MappedPeer
from vllm_rfork.engines.cuda_ipc.streams import CopyStreams
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
def test_an_unreadable_endpoint_is_the_seeds_failure(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        CudaIpcEngine.lane_obstacle(text, EngineConfig(device="cuda:0"))
    assert (caught.value.side, caught.value.retry_elsewhere) == ("seed", True)


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


class Driver:
    """A driver whose first stream cannot be queried, and whose second one copies until ``busy`` is cleared."""

    def __init__(self, code: str) -> None:
        self.made = 0
        self.code: str | None = code
        self.busy = True

    def new_stream(self) -> int:
        self.made += 1
        return self.made

    def allocate_host(self, nbytes: int) -> int:
        return 0

    def is_idle(self, stream: int) -> bool:
        if stream == 1 and self.code is not None:
            raise EngineError(NAME, "read", "a copy failed", code=self.code)
        return stream > 2 or not self.busy


@pytest.mark.parametrize("code", ["CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "CUDA_ERROR_ILLEGAL_ADDRESS"])
def test_the_failure_of_one_stream_says_nothing_about_the_others(code: str) -> None:
    driver = Driver(code)
    streams = CopyStreams(driver, lambda: None)  # type: ignore[arg-type]
    for wait in (lambda: streams.wait(time.monotonic() + 0.1, "read"), lambda: streams.drain(0.1)):
        with pytest.raises(EngineError) as caught:
            wait()
        assert caught.value.in_flight


def test_a_failure_for_good_ends_its_stream_and_another_one_does_not() -> None:
    driver = Driver("CUDA_ERROR_ILLEGAL_ADDRESS")
    driver.busy = False
    streams = CopyStreams(driver, lambda: None)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="a copy failed") as caught:
        streams.wait(time.monotonic() + 20.0, "read")
    assert not caught.value.in_flight
    streams.drain(20.0)
    driver.code = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    with pytest.raises(EngineError) as caught:
        streams.wait(time.monotonic() + 0.1, "read")
    assert caught.value.in_flight
    driver.code = None
    streams.wait(time.monotonic() + 20.0, "read")


def test_a_seed_that_is_too_slow_to_connect_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CudaIpcEngine()
    unmapped: list[Any] = []

    class Context:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    engine._driver = SimpleNamespace(current=lambda operation: Context())  # type: ignore[assignment]

    def late(deadline: float, operation: str) -> None:
        raise EngineError(NAME, operation, "the copies did not end in time", in_flight=True)

    engine._streams = SimpleNamespace(  # type: ignore[assignment]
        queue=lambda copies: None, queue_identity=lambda page: None, wait=late, saw=lambda identity: True
    )
    peer = SimpleNamespace(page=0, identity=b"", unmap=unmapped.append)
    monkeypatch.setattr(cuda_ipc_engine, "decode", lambda text: None)
    monkeypatch.setattr(cuda_ipc_engine, "obstacle", lambda *_: None)
    monkeypatch.setattr(cuda_ipc_engine, "map_peer", lambda *_: peer)
    with pytest.raises(EngineError) as first:
        engine.connect("one seed", 0.1)
    assert not first.value.in_flight
    with pytest.raises(EngineError) as second:
        engine.connect("another seed", 0.1)
    assert not second.value.in_flight
    assert unmapped == [], "a copy may still read the mapping"
    assert len(engine._late) == 2
