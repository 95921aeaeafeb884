"""The memory of one worker's device during its start, and the options that its use depends on.

A start-up plan states the bytes for the KV cache that another start measured. It is right for this worker if all of
these are equal, and still within bounds if the memory beside the cache is measured here once more. Read in vLLM 0.26
and 0.32 (``v1/worker/gpu_worker.py``).
"""

from __future__ import annotations

import gc
import os
from typing import Any

from vllm_rfork.caches.safe.startup_plan import CarriedPlan, DeviceMemory
from vllm_rfork.manifest.facts import short_facts
from vllm_rfork.vllm_compat.key_factors import key_factors, short_digest
from vllm_rfork.vllm_compat.start_up.listener import listener

#: A plan must leave room for this number of requests of ``max_model_len`` tokens: vLLM fails a start whose cache has no
#: room for one, and its own measurement may give a little more than a plan.
REQUESTS = 2
#: Variables that change how much memory libraries take.
_VARIABLES = (
    "NCCL_",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_MODULE_LOADING",
    "CUBLAS_WORKSPACE_CONFIG",
)


def device_memory(worker: Any) -> DeviceMemory:
    """The memory of ``worker``'s device, once its model is loaded."""
    snapshot = worker.init_snapshot
    return DeviceMemory(
        total_nbytes=int(snapshot.total_memory),
        free_nbytes=int(snapshot.free_memory),
        requested_nbytes=int(worker.requested_memory),
        weights_nbytes=int(worker.model_runner.model_memory_usage),
    )


def reset_peak() -> None:
    """Begin to measure the peak of torch's allocations."""
    import torch

    torch.accelerator.reset_peak_memory_stats()


def beside_cache_nbytes(worker: Any, own: DeviceMemory) -> int:
    """The bytes that this worker needs beside its KV cache and its graphs, after the profiling run.

    All that is not free now and was free at the beginning, at least the weights, and what the run took for a while. As
    in vLLM's own measurement, memory of other processes that began meanwhile counts.
    """
    import torch

    gc.collect()
    torch.accelerator.empty_cache()
    stats = torch.accelerator.memory_stats(worker.device)
    free_nbytes, _ = torch.accelerator.get_memory_info(worker.device)
    for_a_while = int(stats["allocated_bytes.all.peak"]) - int(stats["allocated_bytes.all.current"])
    return max(own.free_nbytes - int(free_nbytes), own.weights_nbytes) + max(0, for_a_while)


def needed_nbytes(worker: Any) -> int:
    """The bytes that the KV cache of :data:`REQUESTS` requests of the maximum length takes."""
    specs = worker.get_kv_cache_spec()
    return REQUESTS * sum(int(spec.max_memory_usage_bytes(worker.vllm_config)) for spec in specs.values())


def worker_obstacle(worker: Any, plan: CarriedPlan) -> str | None:
    """The reason why ``plan`` cannot be this worker's, besides memory and settings."""
    parallel_config = worker.vllm_config.parallel_config
    launched = str(getattr(parallel_config, "distributed_executor_backend", None)) == "external_launcher"
    if getattr(parallel_config, "enable_elastic_ep", False) or (launched and parallel_config.data_parallel_size > 1):
        return "ranks that measure together with this one do not vote with it"
    mode = worker.vllm_config.compilation_config.cudagraph_mode
    without = worker.vllm_config.model_config.enforce_eager or getattr(mode, "name", None) == "NONE"
    if not without and not plan.graphs_nbytes:
        return "this worker captures graphs, and the plan has no memory for any"
    if plan.cache_nbytes < (needed := needed_nbytes(worker)):
        return f"{plan.cache_nbytes} bytes for the KV cache are fewer than {needed}, which long requests may take"
    return None


def plan_settings(worker: Any) -> dict[str, str]:
    """Everything besides the device's memory that must be equal for a plan to be right.

    Taken at the entrance of ``determine_available_memory`` on both sides: the configuration changes during a start.

    Raises:
        Exception: whatever vLLM raises when it computes its key.
    """
    import torch

    vllm_config = worker.vllm_config
    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    scheduler_config = vllm_config.scheduler_config
    key = key_factors(vllm_config)  # which vLLM's own fingerprint of a plan has, without what is below
    listener().explain(key.details)
    found = {
        "rank": worker.rank,
        "world_size": parallel_config.world_size,
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "driver": _driver(),
        "device": _device_name(),
        "gpu_memory_utilization": worker.cache_config.gpu_memory_utilization,
        "multimodal": short_digest(repr(model_config.multimodal_config)),
        "sleep_mode": model_config.enable_sleep_mode,
        "max_num_seqs": scheduler_config.max_num_seqs,
        "max_num_batched_tokens": scheduler_config.max_num_batched_tokens,
        "disable_custom_all_reduce": parallel_config.disable_custom_all_reduce,
        "kv_connector": str(getattr(vllm_config.kv_transfer_config, "kv_connector", None)),
        "v2_model_runner": bool(getattr(worker, "use_v2_model_runner", False)),
        "variables": short_digest(str(sorted(each for each in os.environ.items() if each[0].startswith(_VARIABLES)))),
    }
    return {**key.identity, **short_facts(found)}


def _driver() -> str:
    """The CUDA version of the driver; equal drivers have equal ones."""
    import torch

    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "unknown" if version is None else str(version())


def _device_name() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.get_device_name())
