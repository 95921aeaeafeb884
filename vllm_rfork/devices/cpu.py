"""Host memory: no queues, no private layouts, and every address can be registered."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_rfork.devices.base import DeviceBackend


class CpuBackend(DeviceBackend):
    """Host memory, as the base class has it."""

    has_copy_engine: ClassVar[bool] = False

    @property
    def with_index(self) -> torch.device:
        """``cpu``: host memory has no index."""
        return self.device
