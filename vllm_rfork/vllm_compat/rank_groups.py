"""The ranks that load one model together, by vLLM's order of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_rfork.vllm_compat.worker_identity import is_draft


@dataclass(frozen=True)
class RankGroup:
    """The ranks of torch's default process group that load one model together.

    Attributes:
        rank: this process's rank.
        members: all of them, ascending, with ``rank``.
        name: distinguishes this group's keys from other groups' in the same store.
    """

    rank: int = 0
    members: tuple[int, ...] = (0,)
    name: str = ""


def rank_group(vllm_config: Any, model_config: Any) -> RankGroup:
    """The ranks that load ``model_config`` together with this one. Does no I/O.

    All ranks of the instance load a target model: tensor, context and pipeline parallel ranks, and the data parallel
    ranks whose processes form one group with them (those of an MoE model). Data parallel ranks of other models are
    instances of their own, and so are the replicas of elastic expert parallelism and of an external launcher. A draft
    is loaded by all ranks of one pipeline stage.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return RankGroup()
    draft = is_draft(vllm_config, model_config)
    rank = dist.get_rank()
    members = members_of(vllm_config.parallel_config, rank, dist.get_world_size(), draft=draft)
    role = "draft" if draft else "target"
    return RankGroup(rank, members, f"rfork/agreement/{role}/{members[0]}")


def caller_group(vllm_config: Any) -> RankGroup:
    """The ranks on which vLLM calls a worker method together: those of one data parallel rank. Does no I/O."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return RankGroup()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    together = _pipeline_size(vllm_config.parallel_config)
    if world_size % together:  # the size is not this group's own
        together = world_size
    first = rank // together * together
    return RankGroup(rank, tuple(range(first, first + together)), f"rfork/reload/{first}")


def members_of(parallel: Any, rank: int, world_size: int, *, draft: bool) -> tuple[int, ...]:
    """The ranks of torch's default group, of ``world_size`` processes, that load a model together with ``rank``.

    vLLM orders ranks as replica x data x pipeline x context x tensor parallel.
    """
    stage = _stage_size(parallel)
    pipeline = _pipeline_size(parallel)
    with_data = pipeline * _size(parallel, "data_parallel_size")
    # A size that does not divide the group is not its own: the group may or may not contain the data parallel ranks.
    instance = next((size for size in (with_data, pipeline) if world_size % size == 0), world_size)
    first = rank // instance * instance
    members = range(first, first + instance)
    if not draft or instance % pipeline:
        return tuple(members)
    return tuple(other for other in members if other % pipeline // stage == rank % pipeline // stage)


def _stage_size(parallel: Any) -> int:
    return _size(parallel, "tensor_parallel_size") * _size(parallel, "prefill_context_parallel_size")


def _pipeline_size(parallel: Any) -> int:
    return _stage_size(parallel) * _size(parallel, "pipeline_parallel_size")


def _size(parallel: Any, name: str) -> int:
    return int(getattr(parallel, name, 1) or 1)


def is_first_rank() -> bool:
    """True in the process that shows progress."""
    from vllm.distributed import parallel_state

    return bool(parallel_state.get_world_group().rank == 0)
