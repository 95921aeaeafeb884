"""Host memory: nothing is queued, nothing is private, and every address can be registered."""

from __future__ import annotations

from typing import ClassVar

import torch

from vllm_rfork.devices.base import DeviceSide


class CpuSide(DeviceSide):
    """See the module's docstring; nearly all answers are the base's."""

    copies_by_itself: ClassVar[bool] = False

    @property
    def numbered(self) -> torch.device:
        """Host memory has no number."""
        return self.device
