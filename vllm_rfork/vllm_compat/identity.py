"""What vLLM's configuration says about a worker: its ranks, its role, and the facts that shape its bytes."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from vllm_rfork import __version__
from vllm_rfork.seed_key import KV_BOTH, WorkerIdentity

#: Keys of a Hugging Face configuration that say where a model came from or how it talks, not what its bytes are.
#: ``_name_or_path``: the same model may lie in different folders. ``transformers_version``: the writer's version.
#: Generation defaults: sampling only.
_VOLATILE = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "_commit_hash",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "id2label",
        "label2id",
        "task_specific_params",
    }
)


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether ``model_config`` is the draft model's of speculative decoding."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if speculative is not None and model_config is getattr(speculative, "draft_model_config", None):
        return True
    return getattr(model_config, "runner_type", None) == "draft"


def worker_identity(vllm_config: Any, model_config: Any) -> WorkerIdentity:
    """Where this process stands; distributed groups must be initialised, as they are when a model is loaded."""
    from vllm.distributed import parallel_state

    parallel = vllm_config.parallel_config
    kv_transfer = getattr(vllm_config, "kv_transfer_config", None)
    role = getattr(kv_transfer, "kv_role", None)
    with_experts = parallel.enable_expert_parallel and _has_experts(model_config)
    return WorkerIdentity(
        kv_mode=str(role) if role else KV_BOTH,
        node_rank=int(getattr(parallel, "node_rank", 0) or 0),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pp_group().rank_in_group if parallel.pipeline_parallel_size > 1 else None,
        ep_rank=parallel_state.get_ep_group().rank_in_group if with_experts else None,
        is_draft=is_draft(vllm_config, model_config),
        local_rank=_local_rank(parallel, parallel_state),
    )


def _local_rank(parallel: Any, parallel_state: Any) -> int:
    local_rank = int(parallel_state.get_world_group().local_rank)
    # Data-parallel engines of one node each count their workers from 0.
    dp_local = int(getattr(parallel, "data_parallel_rank_local", 0) or 0)
    return local_rank + dp_local * int(getattr(parallel, "world_size", 1))


def _has_experts(model_config: Any) -> bool:
    probe = getattr(model_config, "is_moe", None)
    if isinstance(probe, bool):
        return probe
    counter = getattr(model_config, "get_num_experts", None)
    return bool(counter()) if callable(counter) else False


def fingerprint_facts(
    vllm_config: Any, model_config: Any, *, layout: str, engine: str, device: torch.device, dummy: bool
) -> dict[str, Any]:
    """Everything that shapes the bytes in memory, as plain data for :func:`~vllm_rfork.seed_key.build_fingerprint`.

    Left out on purpose: paths, ports, host names and served names (the same bytes lie anywhere); batch sizes, memory
    limits and scheduling (they shape caches, not weights); sampling defaults; LoRA (base bytes stay); ranks (they are
    in the seed key).
    """
    parallel = vllm_config.parallel_config
    speculative = getattr(vllm_config, "speculative_config", None)
    facts = {
        "plugin": __version__,
        "vllm": _version_of("vllm"),
        "vllm_ascend": _version_of("vllm-ascend"),
        "torch": torch.__version__.partition("+")[0],
        "layout": layout,
        "engine": engine,
        "device": _device_generation(device),
        "dtype": str(model_config.dtype),
        "architectures": list(getattr(model_config.hf_config, "architectures", None) or []),
        "hf_config": _canonical(model_config.hf_config.to_dict()),
        "revision": getattr(model_config, "revision", None),
        "quantization": model_config.quantization,
        "quant_config": _quant_facts(vllm_config, model_config),
        "sizes": {
            name: int(getattr(parallel, name, 1) or 1)
            for name in (
                "tensor_parallel_size",
                "pipeline_parallel_size",
                "data_parallel_size",
                "decode_context_parallel_size",
                "prefill_context_parallel_size",
            )
        },
        "expert_parallel": bool(parallel.enable_expert_parallel),
        # Which experts a rank holds: the same number of them, of the same shapes, either way.
        "expert_placement": str(getattr(parallel, "expert_placement_strategy", "linear")),
        "eplb": bool(getattr(parallel, "enable_eplb", False)),
        "draft": is_draft(vllm_config, model_config),
        "speculative_method": getattr(speculative, "method", None),
        "additional_config": _canonical(getattr(vllm_config, "additional_config", None) or {}),
        "dummy_weights": dummy,
    }
    canonical: dict[str, Any] = _canonical(facts)
    return canonical


def _quant_facts(vllm_config: Any, model_config: Any) -> Any:
    quant_config = getattr(vllm_config, "quant_config", None)
    if quant_config is None:
        return None
    plain = {
        name: value
        for name, value in vars(quant_config).items()
        if not name.startswith("_") and isinstance(value, (bool, int, float, str, list, tuple, dict, type(None)))
    }
    return {"class": type(quant_config).__name__, "fields": _canonical(plain)}


def _device_generation(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return {"type": "cuda", "name": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}"}
    if device.type == "cpu":
        # Post-processing for the processor happens on the receiver; the checkpoint layout is the same everywhere.
        return {"type": "cpu", "name": platform.machine(), "capability": ""}
    backend = getattr(torch, device.type, None)
    name = backend.get_device_name(device) if backend is not None and hasattr(backend, "get_device_name") else ""
    return {"type": device.type, "name": str(name), "capability": ""}


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        if distribution != "vllm":
            return None
        import vllm

        return str(vllm.__version__)


def _canonical(value: Any) -> Any:
    """``value`` as nested mappings, lists and plain values; what is none of these becomes its type's name.

    An object's ``repr`` may hold its address, which would make equal workers differ.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has no NaN and no infinity.
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Mapping):
        return {str(key): _canonical(inner) for key, inner in value.items() if str(key) not in _VOLATILE}
    if isinstance(value, (list, tuple)):
        return [_canonical(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(inner) for inner in value)
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__
