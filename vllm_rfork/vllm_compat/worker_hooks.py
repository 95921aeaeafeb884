"""Hooks on the worker methods that change weights, release their memory, or capture graphs.

A wrapped method reports the beginning and the end of its change to a listener, which withdraws the seed and decides
whether it may resume. Some changes last from one method to another: a worker sleeps until it wakes up, and an update
ends with its last method.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.reloading import ASLEEP, ReloadListener, hook_reload
from vllm_rfork.vllm_compat.weight_changes import Change, WeightChangeListener, WeightChanges
from vllm_rfork.vllm_compat.worker_calls import MARK, hook_calls, is_vllms

logger = worker_logger(__name__)

#: Changes that last beyond their first method.
UPDATING, EMPTIED = "updating", "emptied"

#: The part of sleep mode that concerns weights; the other parts are the KV cache and scratch.
_WEIGHTS_TAG = "weights"


#: Read in vLLM 0.32's and vLLM-Ascend 0.23's workers; absent ones are skipped. ``reload_weights`` writes weights, and
#: ``reloading.py`` records which.
CHANGES_WEIGHTS: dict[str, Change] = {
    "sleep": Change("the worker goes to sleep", begins=ASLEEP, writes=False),
    "discard": Change("the worker discards memory", begins=ASLEEP, writes=False, discards=True),
    "wake_up": Change("the worker wakes up", ends=(ASLEEP,), writes=False),
    # The process may continue elsewhere, with other addresses and under another name.
    "checkpoint_prepare": Change("the worker's process is being checkpointed", last=True, writes=False),
    "reload_weights": Change("weights are reloaded", ends=(EMPTIED,), writes=False),
    "reset_weights": Change("weights are reset", begins=EMPTIED, writes=False, discards=True),
    "update_config": Change("the model or load configuration changes", writes=False),
    # Changes nothing itself, but changes follow.
    "init_weight_transfer_engine": Change("weight transfer starts", writes=False),
    "start_weight_update": Change("weights are updated", begins=UPDATING, ends_failing=(UPDATING,)),
    "start_draft_weight_update": Change("weights are updated", begins=UPDATING, ends_failing=(UPDATING,)),
    # Before vLLM had ``finish_weight_update`` this was the whole update: see ``_change_of``.
    "update_weights": Change("weights are updated", begins=UPDATING, ends_failing=(UPDATING,)),
    "finish_weight_update": Change("weights are updated", ends=(UPDATING, EMPTIED)),
    # A worker's weights depend on its rank and the number of ranks.
    "elastic_ep_execute": Change("expert parallelism is reconfigured", last=True),
    "reinitialize_distributed": Change("expert parallelism is reconfigured", last=True),
    "save_tensorized_model": Change("weights are rewritten for tensorizer"),
    "apply_model": Change("a function is applied to the model"),
    # The load that follows publishes a seed of its own.
    "load_model": Change("the model is loaded again", last=True),
    "shutdown": Change("the worker shuts down", last=True),
}

#: Methods that capture graphs; the first one does it to measure their memory. A call to the device from another thread,
#: such as an allocation, may fail the capture (``capture_error_mode`` in ``torch/cuda/graphs.py``). Read in vLLM 0.32's
#: and vLLM-Ascend 0.23's workers.
CAPTURES_GRAPHS = ("determine_available_memory", "compile_or_warm_up_model")


def withdraw_before_changes(listener: WeightChangeListener, reloads: ReloadListener | None = None) -> list[str]:
    """Wrap every such method of every worker class in this process, and return the names of those that are wrapped.

    The methods that ``worker_extension_cls`` adds are wrapped, too: their effect is unknown, and their purpose is to
    write weights. So are calls by function, and by names that are in no table (``worker_calls.py``). Idempotent: the
    first listener stays.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    wrapped: list[str] = []
    changes = WeightChanges(listener)
    for cls in subclasses(WorkerBase):
        if reloads is not None:
            hook_reload(cls, changes, reloads)
        for name, change in CHANGES_WEIGHTS.items():
            wrapped += _wrap(cls, name, change, changes)
        for name in CAPTURES_GRAPHS:
            wrapped += _wrap(cls, name, None, changes)
    for cls in _extensions(WorkerBase):
        for name in vars(cls):
            if not name.startswith("_"):
                wrapped += _wrap(cls, name, Change(f"the worker extension's {name} is called"), changes)
    wrapped += hook_calls(changes)
    logger.debug("these worker methods withdraw the seed first: %s", ", ".join(wrapped))
    return wrapped


def _wrap(cls: type, name: str, change: Change | None, changes: WeightChanges) -> list[str]:
    """Wrap the class's own method of that name, if it has one; None as ``change`` means that it captures graphs."""
    method = vars(cls).get(name)
    if not isinstance(method, types.FunctionType):
        return []
    if not hasattr(method, MARK):
        wrapper = _capturing(method, changes) if change is None else _withdrawing(name, method, change, changes)
        setattr(cls, name, wrapper)
    return [f"{cls.__name__}.{name}"]


def _withdrawing(name: str, method: Callable[..., Any], change: Change, changes: WeightChanges) -> Callable[..., Any]:
    @functools.wraps(method)
    def withdrawing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in ("wake_up", "discard") and _spares_weights(*args, **kwargs):
            return method(self, *args, **kwargs)
        return changes.run(_change_of(name, change, self, *args, **kwargs), method, self, *args, **kwargs)

    setattr(withdrawing, MARK, True)
    return withdrawing


def _capturing(method: Callable[..., Any], changes: WeightChanges) -> Callable[..., Any]:
    @functools.wraps(method)
    def capturing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(getattr(self, "model_config", None), "enforce_eager", False):
            return method(self, *args, **kwargs)  # there are no graphs
        return changes.run_alone(method, self, *args, **kwargs)

    setattr(capturing, MARK, True)
    return capturing


def _change_of(name: str, change: Change, worker: Any, *args: Any, **kwargs: Any) -> Change:
    if name == "sleep":
        return dataclasses.replace(change, discards=_sleeps_deeply(*args, **kwargs))
    if name == "update_weights" and not hasattr(worker, "finish_weight_update"):
        return Change(change.reason, ends=(EMPTIED,))
    return change


def _sleeps_deeply(level: Any = 1, *args: Any, **kwargs: Any) -> bool:
    """True for a sleep that keeps no copy of the weights."""
    return isinstance(level, int) and level > 1


def _spares_weights(tags: Any = None, *args: Any, **kwargs: Any) -> bool:
    """True if sleep mode does not concern weights; without tags it concerns everything."""
    return isinstance(tags, (list, tuple, set, frozenset)) and _WEIGHTS_TAG not in tags


def subclasses(root: type) -> list[type]:
    """``root`` and all its subclasses in this process."""
    found = [root]
    for cls in found:  # grows during the iteration
        found.extend(set(cls.__subclasses__()) - set(found))
    return found


def _extensions(root: type) -> list[type]:
    """Classes outside vLLM that were mixed into worker classes, with all their bases."""
    bases = {base for cls in subclasses(root) for base in cls.__mro__}
    outside = [base for base in bases if not issubclass(base, root) and not is_vllms(base)]
    return sorted(outside, key=lambda cls: cls.__qualname__)
