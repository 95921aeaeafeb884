"""How vLLM loads: the storage loader behind us, and what a model says about its layout."""

from __future__ import annotations

import dataclasses
import gc
import logging
from typing import Any

import torch
from torch import nn


def storage_loader(load_config: Any, load_format: str, passed_through: dict[str, Any]) -> Any:
    """The loader that reads storage: ``load_config`` with another format and the keys that are not ours.

    Raises:
        ValueError: whatever vLLM says about an unknown format or key.
    """
    from vllm.model_executor.model_loader import get_model_loader

    return get_model_loader(
        dataclasses.replace(load_config, load_format=load_format, model_loader_extra_config=dict(passed_through))
    )


def loads_whole_models(loader: Any) -> bool:
    """Whether ``loader`` replaces ``load_model`` itself (tensorizer, modelexpress, ipc_cache, plugins).

    Such a loader cannot fill a structure that somebody else has built.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    return type(loader).load_model is not BaseModelLoader.load_model


def quantizes_online(model: nn.Module) -> bool:
    """Whether weights are quantized while they are loaded: the checkpoint's bytes never stand in the model."""
    return any(
        getattr(getattr(module, "quant_method", None), "uses_meta_device", False) for module in model.modules()
    ) or any(parameter.is_meta for parameter in model.parameters())


def target_device(vllm_config: Any) -> torch.device:
    """The device that vLLM builds the model on."""
    load_device = vllm_config.load_config.device
    return torch.device(vllm_config.device_config.device if load_device is None else load_device)


def synchronize(device: torch.device) -> None:
    """Wait for everything that was queued on ``device``: asynchronous layout conversions must have finished before
    an address is registered or a byte is digested."""
    backend = getattr(torch, device.type, None)
    if device.type != "cpu" and backend is not None:
        backend.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give freed memory back after a model has been dropped, as vLLM does around loading."""
    gc.collect()
    backend = getattr(torch, device.type, None)
    if device.type != "cpu" and backend is not None:
        backend.empty_cache()


def never_a_seed(vllm_config: Any) -> str:
    """Why workers with this configuration must not offer their weights; empty where they may."""
    if getattr(vllm_config.parallel_config, "enable_eplb", False):
        return "expert load balancing moves weights while serving (enable_eplb)"
    additional = getattr(vllm_config, "additional_config", None) or {}
    eplb = additional.get("eplb_config") if isinstance(additional, dict) else None
    if isinstance(eplb, dict) and (eplb.get("dynamic_eplb") or eplb.get("expert_map_record_path")):
        return "expert load balancing moves weights while serving (additional_config eplb_config)"
    return ""


def is_first_rank() -> bool:
    """Whether this process is the one that shows progress."""
    from vllm.distributed import parallel_state

    return bool(parallel_state.get_world_group().rank == 0)


def log_through_vllm() -> None:
    """Make this package's loggers children of vLLM's, so that its lines look and go like vLLM's.

    vLLM configures its logger after plugins have been loaded, and again when its arguments are known, so handlers
    cannot be copied here; a parent is asked at the time of each line.
    """
    ours = logging.getLogger("vllm_rfork")
    ours.parent = logging.getLogger("vllm")
    ours.setLevel(logging.NOTSET)  # drops cached answers of isEnabledFor
