"""Callbacks while a worker starts: its configuration is known, and its device is set up.

``WorkerBase.__init__`` is the first code of a worker process that gets the configuration after plugins have been loaded
(read in vLLM 0.17 to 0.33 and vLLM-Ascend 0.18 to 0.23). ``init_device`` chooses the device, measures its free memory
and joins the process groups; ``load_model`` follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.storage_loader import target_device

logger = worker_logger(__name__)

_MARK = "_rfork_observes_start"


def observe_worker_start(
    load_format: str,
    configured: Callable[[Mapping[str, Any], str], object],
    device_ready: Callable[[torch.device], object],
) -> None:
    """Call back in each worker of ``load_format``. Idempotent.

    An error, of a callback or of a vLLM that differs, is logged at DEBUG and changes nothing for the worker.

    Args:
        configured: called with the loader's extra config and the type of device, before the device is touched.
        device_ready: called with the device, after the worker's ``init_device``, on the same thread.
    """
    _quietly(lambda: _observe(load_format, configured, device_ready))


def _observe(
    load_format: str,
    configured: Callable[[Mapping[str, Any], str], object],
    device_ready: Callable[[torch.device], object],
) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    original = WorkerBase.__init__
    if hasattr(original, _MARK):
        return

    def observe(worker: Any) -> None:
        config = worker.vllm_config
        if str(config.load_config.load_format).lower() != load_format:
            return
        _after_init_device(worker, lambda: _quietly(lambda: device_ready(target_device(config))))
        configured(config.load_config.model_loader_extra_config, target_device(config).type)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _quietly(lambda: observe(self))

    setattr(__init__, _MARK, True)
    setattr(WorkerBase, "__init__", __init__)  # noqa: B010 - a plain assignment to a method does not type-check


def _after_init_device(worker: Any, then: Callable[[], None]) -> None:
    """Call ``then`` once after this worker's ``init_device``; the class, which other workers share, is left alone."""
    init_device = worker.init_device

    @functools.wraps(init_device)
    def once(*args: Any, **kwargs: Any) -> Any:
        del worker.init_device
        result = init_device(*args, **kwargs)
        then()
        return result

    worker.init_device = once


def _quietly(callback: Callable[[], object]) -> None:
    try:
        callback()
    except Exception as error:  # noqa: BLE001 - preparations; the load reports what is wrong
        logger.debug("nothing was prepared for the load, because %s: %s", type(error).__name__, error)
