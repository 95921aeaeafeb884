"""The fallback's load format, shown to vLLM wherever it derives something from the format.

vLLM reads ``load_config.load_format`` in more places than the choice of a loader (as of vLLM 0.32): to decide whether
the checkpoint determines if word embeddings are tied (not for ``dummy`` and the sharded formats), whether a model in
object storage is accepted and which streamer reads it, how the tensorizer is configured, and whether some models have
embeddings of their own. A worker with ``--load-format rfork`` that loads from storage must equal the worker that the
fallback format alone would have made. So vLLM sees that format while it derives its configuration and while it loads.
In between it sees ``rfork``, and finds this package's loader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from vllm_rfork.errors import ConfigError
from vllm_rfork.vllm_compat.worker_identity import is_draft

OPTION = "rfork_fallback_load_format"
DEFAULT = "auto"

_MARK = "_rfork_shows_fallback"


def fallback_format(load_config: Any) -> str:
    """The fallback's format by the extra config, in vLLM's spelling; validated elsewhere (``config/``)."""
    extra = load_config.model_loader_extra_config
    given = extra.get(OPTION) if isinstance(extra, dict) else None
    return (given.strip().lower() if isinstance(given, str) else "") or DEFAULT


@contextlib.contextmanager
def fallback_shown(load_config: Any, own: str) -> Iterator[None]:
    """Let ``load_config`` say the fallback's format inside the block, if it says ``own``; then ``own`` again."""
    if load_config.load_format != own:
        yield
        return
    load_config.load_format = fallback_format(load_config)
    try:
        yield
    finally:
        load_config.load_format = own


def show_fallback_while_configuring(own: str) -> None:
    """Wrap ``VllmConfig.__post_init__``, in which vLLM derives settings from the load format. Idempotent.

    A format that vLLM chooses there (a streamer for a model in object storage) becomes the fallback's format: it is
    written into the extra config, which travels to the workers.
    """
    from vllm.config import VllmConfig

    original = VllmConfig.__post_init__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        load_config = getattr(self, "load_config", None)
        if load_config is None or load_config.load_format != own:
            original(self, *args, **kwargs)
            return
        shown = fallback_format(load_config)
        load_config.load_format = shown
        try:
            original(self, *args, **kwargs)
            chosen = load_config.load_format
        except ValueError as error:
            if "load_format" not in str(error):
                raise
            raise ConfigError(
                OPTION, f"is {shown}, and vLLM refuses it: {error}", "a format that vLLM names"
            ) from error
        finally:
            load_config.load_format = own
        if chosen != shown:
            load_config.model_loader_extra_config = {**load_config.model_loader_extra_config, OPTION: chosen}
        if chosen == "tensorizer":
            _configure_tensorizer(load_config, self.model_config)

    setattr(post_init, _MARK, True)
    VllmConfig.__post_init__ = post_init


def _configure_tensorizer(load_config: Any, model_config: Any) -> None:
    """Add the settings that ``EngineArgs.create_load_config`` adds for ``--load-format tensorizer``."""
    from vllm.model_executor.model_loader.tensorizer import TensorizerConfig

    extra = load_config.model_loader_extra_config
    if "tensorizer_config" in extra or model_config is None:
        return
    fields = getattr(TensorizerConfig, "_fields", ())
    folder = getattr(model_config, "model_weights", "") or model_config.model
    described = {"tensorizer_dir": folder, **{name: value for name, value in extra.items() if name in fields}}
    load_config.model_loader_extra_config = {**extra, "tensorizer_config": described}


def for_draft(storage_config: Any, vllm_config: Any, model_config: Any) -> Any:
    """The storage loader's ``LoadConfig`` for this model: vLLM changes some formats for a draft (``speculative``)."""
    speculative = getattr(vllm_config, "speculative_config", None)
    if not is_draft(vllm_config, model_config) or getattr(speculative, "draft_load_config", None) is not None:
        return storage_config
    from vllm.model_executor.model_loader import utils

    if storage_config.load_format == "fastsafetensors" and vllm_config.parallel_config.pipeline_parallel_size > 1:
        # It has collectives of all pipeline stages, and a draft is loaded by one of them (vLLM's
        # get_pp_safe_draft_load_config).
        return dataclasses.replace(storage_config, load_format="auto")
    redirect = getattr(utils, "get_draft_load_config", None)
    if redirect is None:  # before 0.32
        return storage_config
    return redirect(SimpleNamespace(speculative_config=speculative, load_config=storage_config))
