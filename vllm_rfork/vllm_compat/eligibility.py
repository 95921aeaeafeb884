"""Obstacles to forking and to becoming a seed, as far as vLLM's configuration and a built model tell."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.vllm_compat import ascend


def quantizes_online(model: nn.Module) -> bool:
    """True if weights are quantized while they are loaded: the model never contains the checkpoint's bytes."""
    return any(
        getattr(getattr(module, "quant_method", None), "uses_meta_device", False) for module in model.modules()
    ) or any(parameter.is_meta for parameter in model.parameters())


def seed_obstacle(vllm_config: Any) -> str | None:
    """The reason why workers with this configuration must not publish their weights; None if they may."""
    if getattr(vllm_config.parallel_config, "enable_eplb", False):
        return "expert load balancing moves weights while serving (enable_eplb)"
    # Until 0.26. Attention writes them into its buffers in its first pass, after the seed has published them.
    cache_config = getattr(vllm_config, "cache_config", None)
    if getattr(cache_config, "calculate_kv_scales", False):
        return "scales of the KV cache are computed from the first requests (calculate_kv_scales)"
    return ascend.moving_weights_obstacle(getattr(vllm_config, "additional_config", None))


def pool_obstacle(vllm_config: Any, device: torch.device) -> str | None:
    """The setting that puts weights into a pool that no engine can register, but that copies on the device reach."""
    if device.type == "cpu":
        return None
    for option in ("enable_sleep_mode", "enable_cumem_allocator"):
        if getattr(vllm_config.model_config, option, False):
            return (
                f"weights lie in a pool of their own, whose memory is unmapped while the worker sleeps and which other "
                f"processes cannot open ({option})"
            )
    return None


def registration_obstacle(vllm_config: Any, device: torch.device) -> str | None:
    """Another setting because of which engines cannot keep this worker's weights registered; None if there is none.

    :meth:`~vllm_rfork.devices.base.DeviceBackend.registration_obstacle` checks the memory itself,
    once the weights are in it.
    """
    if device.type == "cpu":
        return None
    return _offload_obstacle(vllm_config) or device_backend(device).registration_obstacle()


def _offload_obstacle(vllm_config: Any) -> str | None:
    """The option that puts weights outside the device's memory; None if there is none."""
    offload = getattr(vllm_config, "offload_config", None)
    if offload is None:  # before vLLM had this section
        cache_config = getattr(vllm_config, "cache_config", None)
        by_size = getattr(cache_config, "cpu_offload_gb", 0)
        by_layer = 0
    else:
        by_size, by_layer = offload.uva.cpu_offload_gb, offload.prefetch.offload_group_size
    for option, value in (("cpu_offload_gb", by_size), ("offload_group_size", by_layer)):
        if value:
            return f"a part of the weights is offloaded to host memory ({option}={value:g}), out of the engine's reach"
    return None
