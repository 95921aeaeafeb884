"""Hooks at the points of a start where vLLM reads or writes a cache.

Each hook is a module with one function, ``install``. Hooks describe caches to the listener (``listener.py``) and decide
nothing.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from vllm_rfork.caches.manifest import Level
from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)


@dataclass(frozen=True)
class Hook:
    """One row of :data:`HOOKS`.

    Attributes:
        what: the kinds of caches, for the log.
        level: the lowest level of ``rfork_caches`` that needs it.
        module: its ``install()`` is idempotent, and raises ImportError or AttributeError if this vLLM lacks a symbol.
    """

    what: str
    level: Level
    module: str


#: In the order of installation: a later wrapper of one method is the outer one, and nothing comes after warm-up.
HOOKS: tuple[Hook, ...] = (
    Hook("startup_plan", "safe", "vllm_rfork.vllm_compat.start_up.plan_hooks"),
    Hook("autotune_table", "safe", "vllm_rfork.vllm_compat.start_up.autotune_hooks"),
    Hook("model_info", "safe", "vllm_rfork.vllm_compat.start_up.model_infos"),
    Hook("warm-up", "safe", "vllm_rfork.vllm_compat.start_up.warm_up"),
    Hook("torch_aot and inductor", "code", "vllm_rfork.vllm_compat.start_up.compile_hooks"),
    Hook("triton", "code", "vllm_rfork.vllm_compat.start_up.triton_cache"),
    Hook("split_graph", "code", "vllm_rfork.vllm_compat.start_up.split_graphs"),
)


def install_hooks(level: Level) -> None:
    """Install the hooks of ``level``, ``code`` with those of ``safe``. Idempotent, raises nothing.

    A hook that this vLLM does not support costs one INFO line.
    """
    for hook in HOOKS:
        if hook.level != "safe" and level == "safe":
            continue
        try:
            importlib.import_module(hook.module).install()
        except Exception as error:  # noqa: BLE001 - a vLLM that differs must start as without this package
            logger.info("caches: %s is not supported with this vLLM: %s: %s", hook.what, type(error).__name__, error)
