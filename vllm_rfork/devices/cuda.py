"""CUDA devices, by ``torch.cuda`` alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from vllm_rfork.devices.base import DeviceSide


class CudaSide(DeviceSide):
    """One CUDA device of this process."""

    visible_variable: ClassVar[str] = "CUDA_VISIBLE_DEVICES"
    allocator_variables: ClassVar[tuple[str, ...]] = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    # vLLM refuses KV connectors over such memory for the same reason.
    expandable_refused: ClassVar[str] = (
        "their physical pages come and go beneath a registration, and other processes cannot open them; "
        "set expandable_segments:False to fork"
    )

    @property
    def index(self) -> int:
        """The device's number as this process counts."""
        return int(torch.cuda.current_device() if self.device.index is None else self.device.index)

    @property
    def text(self) -> str:
        """``cuda:1``."""
        return f"cuda:{self.index}"

    def use(self) -> None:
        """Make this the calling thread's device."""
        torch.cuda.set_device(self.index)

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        """Give unused memory of the caching allocator back."""
        torch.cuda.empty_cache()

    def _snapshot(self) -> Iterable[Mapping[str, Any]]:
        segments: list[Mapping[str, Any]] = torch.cuda.memory_snapshot()
        return segments
