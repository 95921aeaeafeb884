"""rfork_max_batch_bytes lowers and raises the size of a read, within the engine's bound for the lane."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_rfork.engines.base import Limits
from vllm_rfork.engines.nixl.engine import NixlEngine, _Peer
from vllm_rfork.engines.nixl.peer import Lane
from vllm_rfork.engines.yuanrong.engine import YuanRongEngine
from vllm_rfork.fork import transfer
from vllm_rfork.manifest.segments import Segment


@pytest.mark.parametrize(
    ("largest", "wanted", "expected"),
    [
        (None, None, 100),
        (None, 40, 40),
        (None, 200, 100),
        (300, None, 100),
        (300, 40, 40),
        (300, 200, 200),
        (300, 900, 300),
    ],
)
def test_the_setting_lowers_and_raises(largest: int | None, wanted: int | None, expected: int) -> None:
    assert Limits(100, 10, largest).batch_nbytes(wanted) == expected


def test_batches_of_a_fork_have_the_size_of_the_lane(caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []
    engine = SimpleNamespace(
        name="fake",
        limits_for=lambda endpoint: {"here": Limits(100, 10, 300)}[endpoint],
        read=lambda endpoint, segments, timeout_s: sizes.append(sum(segment.nbytes for segment in segments)),
    )
    for wanted in (None, 250, 1000):
        request: Any = SimpleNamespace(
            max_batch_nbytes=wanted,
            request_timeout_s=5.0,
            timeout_s=5.0,
            arrived=lambda segments: None,
            progress=lambda nbytes: None,
            landing=None,
        )
        keeper: Any = SimpleNamespace(check=lambda: None)
        lane: Any = SimpleNamespace(handle=engine, engine=engine, endpoint="here")
        transfer._read(request, lane, keeper, [Segment(1000, 9000, 600)], time.monotonic() + 60.0)
    assert sizes == [100] * 6 + [250, 250, 100] + [300, 300]


def test_lanes_on_which_nobody_copies_have_larger_batches() -> None:
    """A copy by cross-memory attach is one native call, which no deadline interrupts."""
    engine = NixlEngine()
    sizes = {}
    for lane in Lane:
        peer: Any = _Peer("name", endpoint=None, lane=lane)  # type: ignore[arg-type]
        engine._peers[lane.name] = peer
        sizes[lane] = engine.limits_for(lane.name).max_batch_nbytes
    assert sizes[Lane.CMA] == sizes[Lane.EMULATED] == engine.limits_for("unknown").max_batch_nbytes == 256 << 20
    assert sizes[Lane.CUDA] == sizes[Lane.RDMA] == 2 << 30
    assert YuanRongEngine().limits_for("unknown") is YuanRongEngine.limits
