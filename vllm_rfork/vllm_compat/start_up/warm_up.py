"""The end of a worker's warm-up, after which a start reads no more caches.

``Worker.compile_or_warm_up_model`` returns once for a start, with graphs or without (read in vLLM 0.17 to 0.33).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import listener
from vllm_rfork.vllm_compat.worker_hooks import subclasses

_METHOD = "compile_or_warm_up_model"


def install() -> None:
    """Report the end of warm-up of every worker class in this process to the listener. Idempotent."""
    after_warm_up("the end of warm-up", "_rfork_reports_warm_up", lambda worker: listener().warm())


def after_warm_up(what: str, mark: str, then: Callable[[Any], object]) -> None:
    """Call ``then`` with each worker of this process after its warm-up. Idempotent.

    Args:
        what: for the log, if it fails.
        mark: an attribute of methods that are wrapped already, of its own for each ``then``.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    for cls in subclasses(WorkerBase):
        method = vars(cls).get(_METHOD)
        if isinstance(method, types.FunctionType) and not hasattr(method, mark):
            wrapped = _followed_by(method, what, then)
            setattr(wrapped, mark, True)
            setattr(cls, _METHOD, wrapped)


def _followed_by(method: Callable[..., Any], what: str, then: Callable[[Any], object]) -> Callable[..., Any]:
    @functools.wraps(method)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        with guarded(what):
            then(self)
        return result

    return followed
