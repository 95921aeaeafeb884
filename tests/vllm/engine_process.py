"""Loads a model with real vLLM in this process, as its worker does: ``get_model`` with a fresh VllmConfig each."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.observe import digests_of, watching
from zoo.planner import free_port, meeting_port

__all__ = ["Loaded", "digests_of", "distributed", "free_port", "load", "load_digested", "vllm_config"]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


def vllm_config(
    model: Path | str, *, load_format: str = "auto", extra: dict[str, Any] | None = None, **changes: Any
) -> Any:
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
                1, 0, f"tcp://127.0.0.1:{meeting_port()}", local_rank=0, backend="gloo"
            )
            parallel_state.ensure_model_parallel_initialized(1, 1)
        yield


def load(config: Any) -> Any:
    """The model, by vLLM's own entry point."""
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    from vllm_rfork.vllm_compat.amx import request_amx_tiles

    request_amx_tiles()
    _set_torch_accelerator_to_noop()  # as the CPU worker does before it loads
    _spare_imports()

    with distributed(config):
        return get_model(vllm_config=config)


@functools.cache
def _spare_imports() -> None:
    """Leave what imports have made out of all that collects garbage from here on.

    vLLM does so twice in every load, and looking at a million objects takes ten times as long as loading a tiny model.
    """
    import vllm.model_executor.models.qwen2  # noqa: F401 - what most tests load

    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else native modules complain of leaks


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
    with watching() as watch:
        model = load(config)
    (loaded,) = watch.finish()
    return Loaded(model, loaded.before, loaded.after)
