"""The worker methods that change weights or let their memory go, each wrapped to withdraw the seed first."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

#: Worker method → what the log says. Read in vLLM 0.32's and vLLM-Ascend 0.23's workers; absent ones are skipped.
#: ``init_weight_transfer_engine`` changes nothing yet, but announces that somebody will.
CHANGES_WEIGHTS: dict[str, str] = {
    "sleep": "the worker goes to sleep",
    "wake_up": "the worker wakes up",
    "discard": "the worker discards memory",
    "checkpoint_prepare": "the worker's process is being checkpointed",
    "reload_weights": "weights are reloaded",
    "reset_weights": "weights are reset",
    "update_config": "the model or load configuration changes",
    "init_weight_transfer_engine": "weight transfer starts",
    "start_weight_update": "weights are updated",
    "start_draft_weight_update": "weights are updated",
    "update_weights": "weights are updated",
    "elastic_ep_execute": "expert parallelism is reconfigured",
    "reinitialize_distributed": "expert parallelism is reconfigured",
    "save_tensorized_model": "weights are rewritten for tensorizer",
    "load_model": "the model is loaded again",
    "shutdown": "the worker shuts down",
}

_MARK = "__rfork_withdraws_first__"


def withdraw_before_changes(withdraw: Callable[[str], None]) -> list[str]:
    """Wrap every such method on every worker class of this process; returns the names that are wrapped now.

    Idempotent. ``withdraw`` must not raise; it gets the reason.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    wrapped: list[str] = []
    for cls in _subclasses(WorkerBase):
        for name, reason in CHANGES_WEIGHTS.items():
            method = vars(cls).get(name)
            if callable(method):
                if not hasattr(method, _MARK):
                    setattr(cls, name, _withdrawing(method, reason, withdraw))
                wrapped.append(f"{cls.__name__}.{name}")
    logger.debug("RFork: these worker methods withdraw the seed first: %s", ", ".join(wrapped))
    return wrapped


def _withdrawing(method: Callable[..., Any], reason: str, withdraw: Callable[[str], None]) -> Callable[..., Any]:
    @functools.wraps(method)
    def withdrawing(*args: Any, **kwargs: Any) -> Any:
        withdraw(reason)
        return method(*args, **kwargs)

    setattr(withdrawing, _MARK, True)
    return withdrawing


def _subclasses(root: type) -> list[type]:
    found = [root]
    for cls in found:  # grows while it is walked
        found.extend(set(cls.__subclasses__()) - set(found))
    return found
