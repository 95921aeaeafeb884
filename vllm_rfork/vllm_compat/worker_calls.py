"""Calls into a worker from outside: ``collective_rpc`` takes a function, or the name of any attribute.

A function gets the worker and may write to its weights, so the seed is withdrawn while it runs, as for a method that
is known to change them (``worker_hooks.py``). Names reach a worker through the attributes of vLLM's
``WorkerWrapperBase``, functions through ``run_method`` (one process, Ray) or as bytes that the loop of a worker
process unpickles. Read in vLLM 0.32; what an older version does not have is skipped.

What no hook can see: code in the same process that follows references from the engine to the model
(``llm.llm_engine.model_executor.driver_worker...``). The digests that a receiver checks (``rfork_verify``) do see it.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from vllm_rfork.vllm_compat.weight_changes import Change, Changes

#: On functions and objects that guard something already.
MARK = "__rfork_withdraws_first__"

#: Why → methods of the workers of vLLM and vLLM-Ascend that leave weights alone. Every other public method is in a
#: table of ``worker_hooks.py`` or in :data:`HANDS_OUT`; tests compare them with the installed vLLM and with releases.
LEAVES_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "serves requests": (
        "execute_model",
        "sample_tokens",
        "take_draft_token_ids",
        "execute_dummy_batch",
        "synchronize_device",
        "handle_ft_command",
    ),
    "wraps adapters around layers, whose own weights stay": ("add_lora", "remove_lora", "list_loras", "pin_lora"),
    "reads weights": ("compute_weight_checksums", "save_sharded_state", "get_model_inspection"),
    "makes caches and drops them": (
        "initialize_cache",
        "initialize_from_config",
        "get_kv_cache_spec",
        "get_cache_block_size_bytes",
        "get_supported_kv_cache_layouts",
        "set_kv_cache_layout",
        "get_kv_connector_handshake_metadata",
        "update_max_model_len",
        "reset_mm_cache",
        "reset_encoder_cache",
        "release_late_interaction_query_cache",
        "get_simple_cpu_offload_num_cpu_blocks",
    ),
    "before there is a model, and after a change that was the last": (
        "init_device",
        "checkpoint_restore",
        "uninstall_static_kernel",
    ),
    "measures and reports": (
        "profile",
        "annotate_profile",
        "check_health",
        "get_encoder_timing_stats",
        "get_compilation_match_table",
        "get_supported_tasks",
        "get_supported_pooling_tasks",
        "log_memory_stats",
        "profile_prefill_latency",
        "supports_draft_weight_updates",
    ),
    "ends what an update used": ("shutdown_weight_transfer_engine",),
}
_LEAVES_WEIGHTS = frozenset(name for names in LEAVES_WEIGHTS.values() for name in names)

#: Methods that return the model. Called by a function inside a worker they are part of that change; called by name
#: they give the model itself to whoever runs in the same process, and nobody sees what becomes of it.
HANDS_OUT = ("get_model", "get_draft_model")

#: What can be called by name; objects with a call of their own, such as modules, are state.
_CALLABLE = (types.MethodType, types.FunctionType, types.BuiltinFunctionType, functools.partial)

_FUNCTION_CALLED = Change("a function is called on the worker")


def guard_calls(changes: Changes) -> list[str]:
    """Let every call by function, and by a name that is not known to leave weights alone, run as a change. Idempotent.

    Returns:
        Names of what is guarded now.
    """
    return [*_guard_names(changes), *_guard_functions(changes), *_guard_bytes(changes)]


def is_vllms(cls: type) -> bool:
    """Whether a class belongs to vLLM or to its platform's plugin, whose methods are in tables."""
    return cls.__module__.partition(".")[0] in {"builtins", "typing", "abc", "vllm", "vllm_ascend", _platform()}


@functools.cache
def _platform() -> str:
    """The package of the platform that vLLM runs on."""
    from vllm.platforms import current_platform

    return type(current_platform).__module__.partition(".")[0]


def change_by_name(worker: Any, name: str) -> Change | None:
    """The change that calling ``worker.<name>`` from outside may be; None where it is none, or guards itself."""
    if name in HANDS_OUT:
        return Change(f"the model is handed out ({name})", last=True)
    owner = next((cls for cls in type(worker).__mro__ if name in vars(cls)), None)
    if owner is not None and (hasattr(vars(owner)[name], MARK) or name in _LEAVES_WEIGHTS):
        return None
    if owner is not None and is_vllms(owner) and not name.startswith("_"):
        return None  # newer than the tables; vLLM calls such methods itself, some of them in every step
    return Change(f"the worker's {name} is called")


def _guard_names(changes: Changes) -> list[str]:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    original = WorkerWrapperBase.__getattr__
    if not hasattr(original, MARK):

        @functools.wraps(original)
        def getattr_(self: Any, attr: str) -> Any:
            found = original(self, attr)
            # Inside a change a function looks at the worker through the same wrapper.
            if not isinstance(found, _CALLABLE) or changes.active:
                return found
            change = change_by_name(self.worker, attr)
            return found if change is None else functools.partial(changes.run, change, found)

        setattr(getattr_, MARK, True)
        WorkerWrapperBase.__getattr__ = getattr_
    return ["WorkerWrapperBase.__getattr__"]


def _guard_functions(changes: Changes) -> list[str]:
    """``run_method(worker, function or bytes, ...)``, in every module that has imported it."""
    from vllm.v1 import serial_utils
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    original = serial_utils.run_method
    if not hasattr(original, MARK):

        @functools.wraps(original)
        def run_method(obj: Any, method: Any, args: Any, kwargs: Any) -> Any:
            if isinstance(method, str) or not isinstance(obj, (WorkerBase, WorkerWrapperBase)):
                return original(obj, method, args, kwargs)
            return changes.run(_FUNCTION_CALLED, original, obj, method, args, kwargs)

        setattr(run_method, MARK, True)
        for module in _vllms_modules():
            if getattr(module, "run_method", None) is original:
                module.run_method = run_method  # type: ignore[attr-defined]
    return [f"{module.__name__}.run_method" for module in _vllms_modules() if hasattr(module, "run_method")]


def _guard_bytes(changes: Changes) -> list[str]:
    """The loop of a worker process, which unpickles the function that it is sent and calls it with the worker."""
    guarded = []
    for module in _vllms_modules():
        pickler = getattr(module, "cloudpickle", None)
        if "multiproc_executor" not in module.__name__ or pickler is None:
            continue
        if not hasattr(pickler, MARK):
            module.cloudpickle = _Pickler(pickler, changes)  # type: ignore[attr-defined]
        guarded.append(f"{module.__name__}.cloudpickle")
    return guarded


class _Pickler:
    """The module ``cloudpickle``; functions that it loads run as changes."""

    def __init__(self, module: Any, changes: Changes) -> None:
        self._module, self._changes = module, changes
        setattr(self, MARK, True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def loads(self, *args: Any, **kwargs: Any) -> Any:
        """As cloudpickle's."""
        loaded: Callable[..., Any] = self._module.loads(*args, **kwargs)
        return functools.partial(self._changes.run, _FUNCTION_CALLED, loaded)


def _vllms_modules() -> list[types.ModuleType]:
    """What is imported of vLLM and of its platform's plugin."""
    roots = {"vllm", "vllm_ascend", _platform()}
    return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in roots and module]
