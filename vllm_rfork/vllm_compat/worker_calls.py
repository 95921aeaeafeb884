"""Hooks on calls into a worker: ``collective_rpc`` accepts a function, or the name of any attribute.

A function gets the worker and may write to its weights, so it runs as a change, like the methods in
``worker_hooks.py``. Names reach a worker through vLLM's ``WorkerWrapperBase``, functions through ``run_method`` (one
process, Ray) or as bytes that the loop of a worker process unpickles. Read in vLLM 0.32; names that an older version
lacks are skipped.

No hook covers code in the same process that follows references from the engine to the model
(``llm.llm_engine.model_executor.driver_worker...``). The digests that a receiver verifies (``rfork_verify``) do.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from vllm_rfork.vllm_compat.weight_changes import Change, WeightChanges

#: On functions and objects that are hooks already.
MARK = "__rfork_withdraws_first__"

#: Reason → worker methods of vLLM and vLLM-Ascend that do not change weights. Every other public method is in a table
#: of ``worker_hooks.py`` or in :data:`HANDS_OUT`; tests compare them with the installed vLLM and with releases.
LEAVES_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "serves requests": (
        "execute_model",
        "sample_tokens",
        "take_draft_token_ids",
        "execute_dummy_batch",
        "synchronize_device",
        "handle_ft_command",
    ),
    "wraps adapters around layers, whose own weights do not change": (
        "add_lora",
        "remove_lora",
        "list_loras",
        "pin_lora",
    ),
    "reads weights": ("compute_weight_checksums", "save_sharded_state", "get_model_inspection"),
    "creates and drops caches": (
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

#: Methods that return the model. A call inside a function on a worker is part of that change. A call by name gives the
#: model to code in the same process, whose writes no hook sees.
HANDS_OUT = ("get_model", "get_draft_model")

#: Types of attributes that are called by name; other callables, such as modules, are state.
_CALLABLE = (types.MethodType, types.FunctionType, types.BuiltinFunctionType, functools.partial)

_FUNCTION_CALLED = Change("a function is called on the worker")


def hook_calls(changes: WeightChanges) -> list[str]:
    """Run every call by function, and every call by a name that may change weights, as a change. Idempotent.

    Returns:
        The names of the hooks that exist now.
    """
    return [*_hook_names(changes), *_hook_functions(changes), *_hook_bytes(changes)]


def is_vllms(cls: type) -> bool:
    """True if a class belongs to vLLM or its platform's plugin, so that its methods are in the tables."""
    return cls.__module__.partition(".")[0] in {"builtins", "typing", "abc", "vllm", "vllm_ascend", _platform()}


@functools.cache
def _platform() -> str:
    """The package of the platform that vLLM runs on."""
    from vllm.platforms import current_platform

    return type(current_platform).__module__.partition(".")[0]


def change_by_name(worker: Any, name: str) -> Change | None:
    """The change that a call of ``worker.<name>`` makes; None if it makes none, or has a hook of its own."""
    if name in HANDS_OUT:
        return Change(f"the model is handed out ({name})", last=True)
    owner = next((cls for cls in type(worker).__mro__ if name in vars(cls)), None)
    if owner is not None and (hasattr(vars(owner)[name], MARK) or name in _LEAVES_WEIGHTS):
        return None
    if owner is not None and is_vllms(owner) and not name.startswith("_"):
        return None  # newer than the tables; vLLM itself calls such methods, some of them in every step
    return Change(f"the worker's {name} is called")


def _hook_names(changes: WeightChanges) -> list[str]:
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    original = WorkerWrapperBase.__getattr__
    if not hasattr(original, MARK):

        @functools.wraps(original)
        def getattr_(self: Any, attr: str) -> Any:
            found = original(self, attr)
            # A function on the worker reads attributes through the same wrapper, inside its change.
            if not isinstance(found, _CALLABLE) or changes.active:
                return found
            change = change_by_name(self.worker, attr)
            return found if change is None else functools.partial(changes.run, change, found)

        setattr(getattr_, MARK, True)
        WorkerWrapperBase.__getattr__ = getattr_
    return ["WorkerWrapperBase.__getattr__"]


def _hook_functions(changes: WeightChanges) -> list[str]:
    """Wrap ``run_method(worker, function or bytes, ...)`` in every module that has imported it."""
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


def _hook_bytes(changes: WeightChanges) -> list[str]:
    """Wrap the unpickler in the loop of a worker process, which calls unpickled functions with the worker."""
    hooked = []
    for module in _vllms_modules():
        pickler = getattr(module, "cloudpickle", None)
        if "multiproc_executor" not in module.__name__ or pickler is None:
            continue
        if not hasattr(pickler, MARK):
            module.cloudpickle = _Pickler(pickler, changes)  # type: ignore[attr-defined]
        hooked.append(f"{module.__name__}.cloudpickle")
    return hooked


class _Pickler:
    """The module ``cloudpickle``, except that functions loaded by it run as changes."""

    def __init__(self, module: Any, changes: WeightChanges) -> None:
        self._module, self._changes = module, changes
        setattr(self, MARK, True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def loads(self, *args: Any, **kwargs: Any) -> Any:
        """Load as cloudpickle does."""
        loaded: Callable[..., Any] = self._module.loads(*args, **kwargs)
        return functools.partial(self._changes.run, _FUNCTION_CALLED, loaded)


def _vllms_modules() -> list[types.ModuleType]:
    """The imported modules of vLLM and its platform's plugin."""
    roots = {"vllm", "vllm_ascend", _platform()}
    return [module for name, module in list(sys.modules.items()) if name.partition(".")[0] in roots and module]
