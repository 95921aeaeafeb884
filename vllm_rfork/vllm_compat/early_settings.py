"""Validates this package's options in vLLM's front end, before the model is read and any engine process starts.

The loader validates them as well, but in a worker: many seconds and two processes later, with the reason in the middle
of the tracebacks of three processes. ``EngineArgs.create_engine_config`` runs in the front end, for
``vllm serve`` and for ``LLM(...)``; plugins are loaded before it, in ``EngineArgs.__post_init__`` (vLLM 0.17 to 0.33).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_MARK = "_rfork_checks_options"


def check_options_early(load_format: str, check: Callable[[Any], object]) -> None:
    """Make every later ``create_engine_config`` for ``load_format`` call ``check`` with its extra config. Idempotent.

    An error of ``check`` fails the start. With a vLLM that lacks that method, or with an extra config that is not a
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
        return original(self, *args, **kwargs)

    setattr(create_engine_config, _MARK, True)
    arg_utils.EngineArgs.create_engine_config = create_engine_config
