"""Imports of the fork server, so that each worker starts within a second. Must not initialize a device."""

from __future__ import annotations

import atexit
import gc
import importlib
import logging

logging.getLogger("zoo").debug("imports begin")

for _name in (
    "torch",
    "transformers",
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.engine.arg_utils",
    "vllm.model_executor.model_loader",
    "vllm.v1.engine.core",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.gpu_model_runner",
    "vllm_rfork.loader",
):
    importlib.import_module(_name)

# Every worker inherits the permission, whichever loader it uses.
importlib.import_module("vllm_rfork.vllm_compat.amx").request_amx_tiles()

# vLLM collects garbage twice in every load; what imports have made is never garbage, and scanning it takes a second.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)  # else native modules complain of leaks
