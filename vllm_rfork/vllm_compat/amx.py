"""Permission for AMX tiles, which vLLM uses on CPU without requesting it.

On an x86-64 processor with AMX, vLLM's CPU attention executes ``tilezero``. The kernel ends a process with SIGILL
(exit code -4) if it uses tiles before it has requested them. oneDNN requests them at its first large enough product,
so vLLM works if the first prompt is long (40 tokens) and dies if it is short (4 tokens). This is a defect of vLLM,
seen in 0.32: it affects the default loader as well. torch has the request; to make it early is harmless.
"""

from __future__ import annotations

from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)


def request_amx_tiles() -> None:
    """Request AMX tiles for this process and its forked children, if vLLM runs on CPU and the processor has them.

    A spawned child has to request them again. Repeated calls are harmless.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch

    # Both names are private, and builds for other processors may lack them.
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    request = getattr(torch.cpu, "_init_amx", None)
    if supported is None or request is None or not supported():
        return
    if not request():
        logger.warning(
            "The kernel refused AMX tiles to this process; vLLM's attention on CPU may end with SIGILL. "
            "Allow the arch_prctl system call (ARCH_REQ_XCOMP_PERM), or hide AMX from this machine"
        )
