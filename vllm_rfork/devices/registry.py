"""Which side answers for a torch device."""

from __future__ import annotations

import torch

from vllm_rfork.devices.base import DeviceSide
from vllm_rfork.devices.cpu import CpuSide
from vllm_rfork.devices.cuda import CudaSide
from vllm_rfork.devices.npu import NpuSide
from vllm_rfork.errors import ForkError

_SIDES: dict[str, type[DeviceSide]] = {"cpu": CpuSide, "cuda": CudaSide, "npu": NpuSide}


def device_side(device: torch.device) -> DeviceSide:
    """The side that answers for ``device``.

    Raises:
        ForkError: nothing here knows devices of that type, or its backend is missing.
    """
    side = _SIDES.get(device.type)
    if side is None:
        raise ForkError(f"nothing is known about devices of type {device.type}")
    return side(device)
