"""The plugin's entry point in ``vllm.general_plugins``: vLLM calls :func:`register` once in each of its processes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)

LOAD_FORMAT = "rfork"

#: vLLM-Ascend 0.18 and later registers a loader of the same name by a decorator when this module is imported, which
#: happens once per process.
_IN_TREE = "vllm_ascend.model_loader.rfork.rfork_loader"


def register() -> None:
    """Register this package's loader for ``--load-format rfork``. Idempotent; the order of plugins does not matter.

    On CPU it requests AMX tiles for this process as well, whichever load format is used: see ``vllm_compat/amx.py``.

    The in-tree module of the same name is imported first: its decorator then has run and will not run again.
    """
    from vllm.model_executor import model_loader

    from vllm_rfork.vllm_compat.amx import request_amx_tiles

    request_amx_tiles()
    registered = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {}).get(LOAD_FORMAT)
    if registered is not None and registered.__module__.startswith("vllm_rfork."):
        return
    try:
        importlib.import_module(_IN_TREE)
    except ModuleNotFoundError as error:
        if not _IN_TREE.startswith(error.name or "?"):
            logger.warning("vLLM-Ascend's rfork module does not import (%s); this package's is used", error)
    except Exception as error:  # noqa: BLE001 - a module that is not needed must not fail the start
        logger.warning("vLLM-Ascend's rfork module does not import (%r); this package's is used", error)
    from vllm_rfork.config import parse_config
    from vllm_rfork.engines.registry import check_engines
    from vllm_rfork.load import early
    from vllm_rfork.loader import RForkModelLoader
    from vllm_rfork.metrics.front_end import show_workers
    from vllm_rfork.startup.early_infos import while_configuring
    from vllm_rfork.vllm_compat.early_settings import check_options_early
    from vllm_rfork.vllm_compat.fallback_format import show_fallback_while_configuring
    from vllm_rfork.vllm_compat.ray_environment import copy_to_ray_workers
    from vllm_rfork.vllm_compat.storage_loader import check_format
    from vllm_rfork.vllm_compat.vllm_log import log_through_vllm
    from vllm_rfork.vllm_compat.worker_start import observe_worker_start

    log_through_vllm()

    def check(extra: Mapping[str, Any] | None) -> None:
        settings = parse_config(extra).settings
        check_format(settings.rfork_fallback_load_format)
        check_engines(settings.rfork_engine)
        show_workers()

    check_options_early(LOAD_FORMAT, check, while_configuring)
    show_fallback_while_configuring(LOAD_FORMAT)
    copy_to_ray_workers()
    observe_worker_start(LOAD_FORMAT, early.configured, early.device_ready)
    model_loader.register_model_loader(LOAD_FORMAT)(RForkModelLoader)
