"""A worker's ranks and role, from vLLM's configuration."""

from __future__ import annotations

import math
from typing import Any

from vllm_rfork.seed_key import KV_BOTH, WorkerIdentity


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """True if ``model_config`` is the draft model's of speculative decoding."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is not None and model_config is getattr(speculative, "draft_model_config", None):
        return True
    return getattr(model_config, "runner_type", None) == "draft"


def worker_identity(vllm_config: Any, model_config: Any) -> WorkerIdentity:
    """The identity of this process. Distributed groups must be initialized, as they are when a model is loaded."""
    from vllm.distributed import parallel_state

    parallel = vllm_config.parallel_config
    return WorkerIdentity(
        kv_mode=_kv_mode(vllm_config),
        node_rank=int(getattr(parallel, "node_rank", 0) or 0),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pp_group().rank_in_group if parallel.pipeline_parallel_size > 1 else None,
        ep_rank=parallel_state.get_ep_group().rank_in_group if _splits_experts(parallel, model_config) else None,
        is_draft=is_draft(vllm_config, model_config),
        local_rank=_local_rank(parallel, parallel_state),
        context_rank=_context_rank(parallel, parallel_state),
    )


def first_identity(vllm_config: Any, model_config: Any) -> WorkerIdentity:
    """The identity of the first worker of an instance, before there is one: every rank that it has is 0."""
    parallel = vllm_config.parallel_config
    return WorkerIdentity(
        kv_mode=_kv_mode(vllm_config),
        node_rank=int(getattr(parallel, "node_rank", 0) or 0),
        tp_rank=0,
        pp_rank=0 if parallel.pipeline_parallel_size > 1 else None,
        ep_rank=0 if _splits_experts(parallel, model_config) else None,
        is_draft=is_draft(vllm_config, model_config),
    )


def _kv_mode(vllm_config: Any) -> str:
    role = getattr(getattr(vllm_config, "kv_transfer_config", None), "kv_role", None)
    return str(role) if role else KV_BOTH


def _splits_experts(parallel: Any, model_config: Any) -> bool:
    return bool(parallel.enable_expert_parallel and _has_experts(model_config))


def _context_rank(parallel: Any, parallel_state: Any) -> int:
    if int(getattr(parallel, "prefill_context_parallel_size", 1) or 1) == 1:  # before 0.13 there was none
        return 0
    return int(parallel_state.get_pcp_group().rank_in_group)


def _local_rank(parallel: Any, parallel_state: Any) -> int:
    local_rank = int(parallel_state.get_world_group().local_rank)
    dp_local = getattr(parallel, "data_parallel_rank_local", None)
    if dp_local is None and getattr(parallel, "distributed_executor_backend", None) not in ("ray", "external_launcher"):
        dp_local = getattr(
            parallel, "data_parallel_index", 0
        )  # as vLLM assigns devices; the other executors count by node
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
    first = int(dp_local or 0) * math.prod(int(getattr(parallel, name, 1) or 1) for name in sizes)
    # Each data parallel engine of a node counts its workers from 0, unless the platform's worker adds an offset.
    return local_rank if local_rank >= first else local_rank + first


def _has_experts(model_config: Any) -> bool:
    probe = getattr(model_config, "is_moe", None)
    if isinstance(probe, bool):
        return probe
    counter = getattr(model_config, "get_num_experts", None)
    return bool(counter()) if callable(counter) else False
