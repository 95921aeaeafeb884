"""Loads a model with real vLLM in this process, as its worker does: ``get_model`` with a fresh VllmConfig each."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_config(model: Path, *, load_format: str = "auto", extra: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A fresh VllmConfig, made from engine arguments as ``vllm serve`` makes it."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_rfork.plugin import register

    register()  # what vLLM's plugin entry point does in every process
    arguments = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "load_format": load_format,
        "model_loader_extra_config": extra or {},
        "max_model_len": 64,
    }
    return EngineArgs(**{**arguments, **changes}).create_engine_config()


@contextlib.contextmanager
def distributed(config: Any) -> Iterator[None]:
    """vLLM's process groups for one worker."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    with set_current_vllm_config(config):
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.init_distributed_environment(
                1, 0, f"tcp://127.0.0.1:{free_port()}", local_rank=0, backend="gloo"
            )
            parallel_state.ensure_model_parallel_initialized(1, 1)
        yield


def load(config: Any) -> Any:
    """The model, by vLLM's own entry point."""
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()  # as the CPU worker does before it loads

    with distributed(config):
        return get_model(vllm_config=config)


@dataclasses.dataclass
class Loaded:
    """A loaded model and the digest of each tensor, by name: as loaded, and after post-processing."""

    model: Any
    before: dict[str, str]
    after: dict[str, str]


def load_digested(config: Any) -> Loaded:
    """Load as :func:`load` does, and digest every tensor at the moment when post-processing begins, and after it.

    The moment is the same for every loader: vLLM's own ``load_model`` calls post-processing.
    """
    from vllm.model_executor.model_loader import base_loader

    seen: dict[str, str] = {}
    process = base_loader.process_weights_after_loading

    def looking(model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        seen.update(digests_of(model))
        return process(model, *args, **kwargs)

    base_loader.process_weights_after_loading = looking
    try:
        model = load(config)
    finally:
        base_loader.process_weights_after_loading = process
    return Loaded(model, seen, digests_of(model))


def digests_of(model: Any) -> dict[str, str]:
    """SHA-256 over the elements of every tensor that the walk finds, independent of the digests under test.

    Handles of packed weights are addresses inside a process and differ from load to load.
    """
    import torch

    from vllm_rfork.walk import walk

    found = {}
    for leaf in walk(model):
        if isinstance(leaf.value, torch.Tensor) and not leaf.name.endswith("handler_tensor"):
            raw = leaf.value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            found[leaf.name] = hashlib.sha256(f"{leaf.value.dtype}{tuple(leaf.value.shape)}".encode() + raw).hexdigest()
    return found
