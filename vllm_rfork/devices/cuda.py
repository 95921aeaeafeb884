"""CUDA devices, through ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from vllm_rfork.devices.base import DeviceBackend


class CudaBackend(DeviceBackend):
    """One CUDA device of this process."""

    visible_variable: ClassVar[str] = "CUDA_VISIBLE_DEVICES"
    allocator_variables: ClassVar[tuple[str, ...]] = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    # vLLM refuses KV connectors over such memory for the same reason.
    expandable_obstacle: ClassVar[str | None] = (
        "their physical pages change under a registration, and other processes cannot open them; "
        "set expandable_segments:False to fork"
    )

    @property
    def index(self) -> int:
        """The device's number within the process."""
        return int(torch.cuda.current_device() if self.device.index is None else self.device.index)

    @property
    def name(self) -> str:
        """``cuda:1``."""
        return f"cuda:{self.index}"

    def set_current(self) -> None:
        """Make this the calling thread's current device."""
        torch.cuda.set_device(self.index)

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(self.device)

    def empty_cache(self) -> None:
        """Return the caching allocator's unused memory."""
        torch.cuda.empty_cache()

    def _snapshot(self) -> Iterable[Mapping[str, Any]]:
        segments: list[Mapping[str, Any]] = torch.cuda.memory_snapshot()
        return segments
