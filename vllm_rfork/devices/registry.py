"""The backend of each type of torch device."""

from __future__ import annotations

import torch

from vllm_rfork.devices.base import DeviceBackend
from vllm_rfork.devices.cpu import CpuBackend
from vllm_rfork.devices.cuda import CudaBackend
from vllm_rfork.devices.npu import NpuBackend
from vllm_rfork.errors import ForkError

_BACKENDS: dict[str, type[DeviceBackend]] = {"cpu": CpuBackend, "cuda": CudaBackend, "npu": NpuBackend}


def device_backend(device: torch.device) -> DeviceBackend:
    """The backend of ``device``.

    Raises:
        ForkError: devices of that type are not supported, or its package is missing.
    """
    backend = _BACKENDS.get(device.type)
    if backend is None:
        raise ForkError(f"devices of type {device.type} are not supported; RFork knows {', '.join(_BACKENDS)}")
    return backend(device)
