"""The front end's moment for this package: before the model is read and any engine process starts.

Options are validated there, and what vLLM derives from the model's class can be taken from a seed.

The loader validates them as well, but in a worker: many seconds and two processes later, with the reason in the middle
of the tracebacks of three processes. ``EngineArgs.create_engine_config`` runs in the front end, for
``vllm serve`` and for ``LLM(...)``; plugins are loaded before it, in ``EngineArgs.__post_init__`` (vLLM 0.17 to 0.33).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from vllm_rfork.seed_key import KV_BOTH, WorkerIdentity

_MARK = "_rfork_checks_options"


def check_options_early(
    load_format: str,
    check: Callable[[Any], object],
    around: Callable[[Any, Any], AbstractContextManager[object]] = lambda arguments, extra: contextlib.nullcontext(),
) -> None:
    """Make every later ``create_engine_config`` for ``load_format`` call ``check`` with its extra config. Idempotent.

    An error of ``check`` fails the start. ``around`` gets vLLM's arguments and the extra config, and the configuration
    is made in the context that it returns. With a vLLM that lacks that method, or with an extra config that is not a
    mapping yet, only the worker validates.
    """
    from vllm.engine import arg_utils

    original = getattr(arg_utils.EngineArgs, "create_engine_config", None)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = getattr(self, "model_loader_extra_config", None)
        if str(getattr(self, "load_format", "")).lower() == load_format and isinstance(given, dict):
            check(given)
            with around(self, given):
                return original(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(create_engine_config, _MARK, True)
    arg_utils.EngineArgs.create_engine_config = create_engine_config


def first_ranks(arguments: Any) -> list[WorkerIdentity]:
    """The identities that the first worker of these ``EngineArgs`` may have: their own kinds of rank are all 0.

    With expert parallelism there are two: only a model with experts has such ranks, and the model is not known yet.
    """
    given = getattr(arguments, "kv_transfer_config", None)
    role = given.get("kv_role") if isinstance(given, dict) else getattr(given, "kv_role", None)
    pipeline = int(getattr(arguments, "pipeline_parallel_size", 1) or 1) > 1
    with_experts = [0, None] if getattr(arguments, "enable_expert_parallel", False) else [None]
    return [
        WorkerIdentity(
            kv_mode=str(role) if role else KV_BOTH,
            node_rank=int(getattr(arguments, "node_rank", 0) or 0),
            tp_rank=0,
            pp_rank=0 if pipeline else None,
            ep_rank=ep_rank,
        )
        for ep_rank in with_experts
    ]
