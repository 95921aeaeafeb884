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

_MARK = "_rfork_reports_warm_up"
_METHOD = "compile_or_warm_up_model"


def install() -> None:
    """Report the end of warm-up of every worker class in this process to the listener."""
    from vllm.v1.worker.worker_base import WorkerBase

    for cls in subclasses(WorkerBase):
        method = vars(cls).get(_METHOD)
        if isinstance(method, types.FunctionType) and not hasattr(method, _MARK):
            setattr(cls, _METHOD, _reporting(method))


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def reporting(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        with guarded("the end of warm-up"):
            listener().warm()
        return result

    setattr(reporting, _MARK, True)
    return reporting
