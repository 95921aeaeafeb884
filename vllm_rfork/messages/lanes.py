"""Engines and lanes that have metric series of their own; receivers may report any text."""

from __future__ import annotations

OTHER = "(other)"

#: The lanes of this package's engines, as ``TransferEngine.lane`` returns them, by engine.
LANES: dict[str, frozenset[str]] = {
    "cuda_ipc": frozenset({"cuda_ipc"}),
    "nixl": frozenset({"nixl", "nixl/rdma", "nixl/cma", "nixl/cuda_ipc", "nixl/tcp"}),
    "mooncake": frozenset({"mooncake", "mooncake/rdma", "mooncake/tcp", "mooncake/efa", "mooncake/ascend"}),
    "collective": frozenset({"collective", "collective/tcp", "collective/nccl", "collective/hccl"}),
    "yuanrong": frozenset({"yuanrong"}),
    "memory": frozenset({"memory"}),
}


def lane_labels(lane: str) -> tuple[str, str]:
    """The labels ``engine`` and ``lane`` for a reported lane: known names, and ``(other)`` for anything else."""
    engine = lane.partition("/")[0]
    if engine not in LANES:
        return OTHER, OTHER
    return engine, lane if lane in LANES[engine] else OTHER
