"""Reasons why a seed's memory cannot be mapped, found without a call of the driver."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

from vllm_rfork.engines.cuda_ipc.endpoint import Endpoint

ELSEWHERE = (
    "the seed is on another host, and CUDA IPC works within one: use an engine that has a network lane "
    "(nixl with RDMA, or collective)"
)
#: The driver's list of this host's GPUs, one folder each; a container may have only part of it, or nothing.
GPUS = Path("/proc/driver/nvidia/gpus")
DEVICE_FILES = Path("/dev")


def obstacle(endpoint: Endpoint, boot: str) -> str | None:
    """The reason why this process cannot map the seed's memory, and the remedy; None if only the driver can tell.

    Args:
        boot: the identifier of this host's running kernel.
    """
    if endpoint.boot != boot:
        return ELSEWHERE
    return _hidden_gpu(uuid.UUID(bytes=endpoint.device))


def _hidden_gpu(gpu: uuid.UUID) -> str | None:
    """The reason if the driver lists this GPU, but its device file is not in this container."""
    for described in GPUS.glob("*/information"):
        try:
            text = described.read_text()
        except OSError:
            continue
        if f"GPU-{gpu}" not in text or (minor := re.search(r"Device Minor:\s*(\d+)", text)) is None:
            continue
        file = DEVICE_FILES / f"nvidia{minor[1]}"
        if not file.exists():
            return (
                f"this container has no access to the seed's GPU {gpu}: {file} is missing. Give the container all GPUs "
                "of the seeds, and choose its own one by CUDA_VISIBLE_DEVICES"
            )
    return None
