"""The worker methods that change weights or let their memory go.

Each is wrapped, and so are those that capture graphs: the seed withdraws first, and where the method has ended the
change, the worker is asked whether it can vouch for its weights again. Some changes last from one method to another: a
worker sleeps until it wakes up, and an update is over when its last method says so. Must not decide what the weights
are worth: whoever is called does.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.weight_changes import Change, Changes, Guard
from vllm_rfork.vllm_compat.worker_calls import MARK, guard_calls, is_vllms

logger = worker_logger(__name__)

#: Changes that last beyond the method that begins them.
ASLEEP, UPDATING, EMPTIED = "asleep", "updating", "emptied"

#: Part of vLLM's sleep mode that concerns weights; the other parts are the KV cache and scratch.
_WEIGHTS_TAG = "weights"


#: Read in vLLM 0.32's and vLLM-Ascend 0.23's workers; absent ones are skipped.
CHANGES_WEIGHTS: dict[str, Change] = {
    "sleep": Change("the worker goes to sleep", begins=ASLEEP),
    "discard": Change("the worker discards memory", begins=ASLEEP),
    "wake_up": Change("the worker wakes up", ends=(ASLEEP,)),
    # The process may go on elsewhere, with other addresses and under another name.
    "checkpoint_prepare": Change("the worker's process is being checkpointed", last=True),
    "reload_weights": Change("weights are reloaded", ends=(EMPTIED,)),
    "reset_weights": Change("weights are reset", begins=EMPTIED),
    "update_config": Change("the model or load configuration changes"),
    # Changes nothing yet, but announces that somebody will.
    "init_weight_transfer_engine": Change("weight transfer starts"),
    "start_weight_update": Change("weights are updated", begins=UPDATING, ends_failing=(UPDATING,)),
    "start_draft_weight_update": Change("weights are updated", begins=UPDATING, ends_failing=(UPDATING,)),
    # Before vLLM had ``finish_weight_update`` this was all of an update: see ``_change_of``.
    "update_weights": Change("weights are updated", begins=UPDATING, ends_failing=(UPDATING,)),
    "finish_weight_update": Change("weights are updated", ends=(UPDATING, EMPTIED)),
    # A worker's rank and the number of ranks are part of what its weights are.
    "elastic_ep_execute": Change("expert parallelism is reconfigured", last=True),
    "reinitialize_distributed": Change("expert parallelism is reconfigured", last=True),
    "save_tensorized_model": Change("weights are rewritten for tensorizer"),
    "apply_model": Change("a function is applied to the model"),
    # The load that follows makes a seed of its own.
    "load_model": Change("the model is loaded again", last=True),
    "shutdown": Change("the worker shuts down", last=True),
}

#: Methods that capture graphs, the first to see how much memory they take. What another thread of the process asks of
#: the device meanwhile, an allocation for instance, may fail the capture (``torch/cuda/graphs.py``:
#: ``capture_error_mode``). Read in vLLM 0.32's and vLLM-Ascend 0.23's workers.
CAPTURES_GRAPHS = ("determine_available_memory", "compile_or_warm_up_model")


def withdraw_before_changes(guard: Guard) -> list[str]:
    """Wrap every such method on every worker class of this process; returns the names that are wrapped now.

    So are the methods that ``worker_extension_cls`` adds: what they do is unknown, and writing weights is what they
    are for. Calls by function, and by a name that nobody has read, are guarded as well (``worker_calls.py``).
    Idempotent: the first guard stays.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    wrapped: list[str] = []
    changes = Changes(guard)
    for cls in _subclasses(WorkerBase):
        for name, change in CHANGES_WEIGHTS.items():
            wrapped += _wrap(cls, name, change, changes)
        for name in CAPTURES_GRAPHS:
            wrapped += _wrap(cls, name, None, changes)
    for cls in _extensions(WorkerBase):
        for name in vars(cls):
            if not name.startswith("_"):
                wrapped += _wrap(cls, name, Change(f"the worker extension's {name} is called"), changes)
    wrapped += guard_calls(changes)
    logger.debug("these worker methods withdraw the seed first: %s", ", ".join(wrapped))
    return wrapped


def _wrap(cls: type, name: str, change: Change | None, changes: Changes) -> list[str]:
    """Wrap the class's own method of that name, if it has one; without a change it captures graphs."""
    method = vars(cls).get(name)
    if not isinstance(method, types.FunctionType):
        return []
    if not hasattr(method, MARK):
        wrapper = _capturing(method, changes) if change is None else _withdrawing(name, method, change, changes)
        setattr(cls, name, wrapper)
    return [f"{cls.__name__}.{name}"]


def _withdrawing(name: str, method: Callable[..., Any], change: Change, changes: Changes) -> Callable[..., Any]:
    @functools.wraps(method)
    def withdrawing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name in ("wake_up", "discard") and _spares_weights(*args, **kwargs):
            return method(self, *args, **kwargs)
        return changes.run(_change_of(name, change, self), method, self, *args, **kwargs)

    setattr(withdrawing, MARK, True)
    return withdrawing


def _capturing(method: Callable[..., Any], changes: Changes) -> Callable[..., Any]:
    @functools.wraps(method)
    def capturing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(getattr(self, "model_config", None), "enforce_eager", False):
            return method(self, *args, **kwargs)  # there are no graphs
        return changes.run_alone(method, self, *args, **kwargs)

    setattr(capturing, MARK, True)
    return capturing


def _change_of(name: str, change: Change, worker: Any) -> Change:
    if name == "update_weights" and not hasattr(worker, "finish_weight_update"):
        return Change(change.reason, ends=(EMPTIED,))
    return change


def _spares_weights(tags: Any = None, *args: Any, **kwargs: Any) -> bool:
    """Whether sleep mode is told to leave weights as they are; without tags it means everything."""
    return isinstance(tags, (list, tuple, set, frozenset)) and _WEIGHTS_TAG not in tags


def _subclasses(root: type) -> list[type]:
    found = [root]
    for cls in found:  # grows while it is walked
        found.extend(set(cls.__subclasses__()) - set(found))
    return found


def _extensions(root: type) -> list[type]:
    """Classes that were mixed into worker classes from outside vLLM, with all that they inherit from."""
    bases = {base for cls in _subclasses(root) for base in cls.__mro__}
    outside = [base for base in bases if not issubclass(base, root) and not is_vllms(base)]
    return sorted(outside, key=lambda cls: cls.__qualname__)
