"""The storage loader: vLLM's loader for the fallback format, and the memory that it loads into."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ConfigError
from vllm_rfork.vllm_compat import fallback_format


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
    """True if ``loader`` replaces ``load_model`` itself (tensorizer, modelexpress, ipc_cache, plugins).

    Such a loader cannot fill a model that was built without it.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    return type(loader).load_model is not BaseModelLoader.load_model


def target_device(vllm_config: Any) -> torch.device:
    """The device that vLLM builds the model on."""
    load_device = vllm_config.load_config.device
    return torch.device(vllm_config.device_config.device if load_device is None else load_device)


def release_memory(device: torch.device) -> None:
    """Give freed memory back after a model has been dropped, as vLLM does around loading."""
    gc.collect()
    device_backend(device).empty_cache()
