"""How vLLM loads: the storage loader behind us, and what a model says about its layout."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ConfigError
from vllm_rfork.vllm_compat import ascend, fallback_format


def storage_loader(
    load_config: Any,
    load_format: str,
    passed_through: dict[str, Any],
    *,
    vllm_config: Any = None,
    model_config: Any = None,
) -> Any:
    """The loader that reads storage: ``load_config`` with another format and the keys that are not ours.

    Args:
        vllm_config, model_config: given where a model is loaded: for a draft vLLM changes some formats.

    Raises:
        ValueError: whatever vLLM says about an unknown format or key.
    """
    from vllm.model_executor.model_loader import get_model_loader

    storage = dataclasses.replace(load_config, load_format=load_format, model_loader_extra_config=dict(passed_through))
    if model_config is not None:
        storage = fallback_format.for_draft(storage, vllm_config, model_config)
    return get_model_loader(storage)


def check_format(load_format: str) -> None:
    """Raise :class:`ConfigError` if vLLM has no loader for ``load_format``: now, and not when there is no seed."""
    from vllm.model_executor import model_loader

    known = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", None)
    if known is not None and load_format not in known:
        others = sorted(name for name in known if name != "rfork")
        raise ConfigError(fallback_format.OPTION, f"vLLM has no format {load_format}", f"one of {', '.join(others)}")


def external_nbytes(loader: Any, vllm_config: Any) -> int:
    """Bytes of weights on this device that ``loader`` maps from another process instead of loading them."""
    ask = getattr(loader, "get_external_weight_memory", None)  # from vLLM 0.32 on
    return int(ask(vllm_config)) if ask is not None else 0


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


def fill_with_dummies(model: nn.Module, model_config: Any, load_config: Any) -> None:
    """Fill ``model`` as ``--load-format dummy`` does, so that post-processing runs on it in every quantization method.

    Integers, which that leaves as they lie in memory, become 0: group indices and packed weights are used as indices.
    """
    for parameter in model.parameters():  # buffers are made by construction and mean something
        if not (parameter.is_meta or parameter.is_floating_point() or parameter.is_complex()):
            parameter.data.zero_()
    loader = storage_loader(load_config, "dummy", {})
    loader.load_weights(model, model_config)


def tie_dummies(model: nn.Module, span_of: Mapping[str, int]) -> None:
    """Make output head and input embeddings equal or unlike each other, as they are on the seed.

    From 0.29 on post-processing compares the two by value and shares their memory where they are equal, and dummy
    weights of one shape all are.

    Args:
        span_of: the span in which the seed has each tensor, by name; names in one span share memory.
    """
    head_name, embedding_name = _head_and_embedding(model)
    if not head_name:
        return
    head, embedding = model.get_submodule(head_name).weight, model.get_submodule(embedding_name).weight
    if head.is_meta or embedding.is_meta or head.dtype.itemsize < 2:  # quantized ones are not compared
        return
    if head.data_ptr() != embedding.data_ptr() and head.shape == embedding.shape:
        head.data.copy_(embedding.data)
        # Where both are one module on the seed, the head has no name of its own there.
        if span_of.get(f"{head_name}.weight") not in (None, span_of.get(f"{embedding_name}.weight")):
            head.data.add_(1.0)


def _head_and_embedding(model: nn.Module) -> tuple[str, str]:
    """Names of the one output head and the one input embedding, as vLLM looks for them; empty where there are more."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, VocabParallelEmbedding)]
    plain = [(name, module) for name, module in found if isinstance(getattr(module, "weight", None), torch.Tensor)]
    heads = [name for name, module in plain if isinstance(module, ParallelLMHead)]
    embeddings = [name for name, module in plain if not isinstance(module, ParallelLMHead)]
    return (heads[0], embeddings[0]) if len(heads) == len(embeddings) == 1 else ("", "")


def target_device(vllm_config: Any) -> torch.device:
    """The device that vLLM builds the model on."""
    load_device = vllm_config.load_config.device
    return torch.device(vllm_config.device_config.device if load_device is None else load_device)


def release_memory(device: torch.device) -> None:
    """Give freed memory back after a model has been dropped, as vLLM does around loading."""
    gc.collect()
    device_backend(device).empty_cache()


def never_a_seed(vllm_config: Any) -> str:
    """Why workers with this configuration must not offer their weights; empty where they may."""
    if getattr(vllm_config.parallel_config, "enable_eplb", False):
        return "expert load balancing moves weights while serving (enable_eplb)"
    # To 0.26. Attention writes them into its buffers in its first pass, after they have been vouched for.
    cache_config = getattr(vllm_config, "cache_config", None)
    if getattr(cache_config, "calculate_kv_scales", False):
        return "scales of the KV cache are computed from the first requests (calculate_kv_scales)"
    return ascend.moves_weights(getattr(vllm_config, "additional_config", None))


def unregistrable(vllm_config: Any, device: torch.device) -> str:
    """Why engines cannot keep this worker's weights registered, as far as settings tell; empty where they can.

    :meth:`~vllm_rfork.devices.base.DeviceBackend.registration_obstacle` tells more once the weights lie somewhere.
    """
    if device.type == "cpu":
        return ""
    for option in ("enable_sleep_mode", "enable_cumem_allocator"):
        if getattr(vllm_config.model_config, option, False):
            return (
                f"weights lie in a pool of their own, whose memory is unmapped while the worker sleeps and which other "
                f"processes cannot open ({option})"
            )
    if reason := _offloads(vllm_config):
        return reason
    return device_backend(device).registration_obstacle() or ""


def _offloads(vllm_config: Any) -> str:
    """Why weights lie outside the device's memory, by vLLM's options; empty where they do not."""
    offload = getattr(vllm_config, "offload_config", None)
    if offload is None:  # before there was one
        cache_config = getattr(vllm_config, "cache_config", None)
        by_size = getattr(cache_config, "cpu_offload_gb", 0)
        by_layer = 0
    else:
        by_size, by_layer = offload.uva.cpu_offload_gb, offload.prefetch.offload_group_size
    for option, value in (("cpu_offload_gb", by_size), ("offload_group_size", by_layer)):
        if value:
            return f"a part of the weights is offloaded to host memory ({option}={value:g}), out of the engine's reach"
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
