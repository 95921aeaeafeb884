"""Host memory: nothing is queued, nothing is private, and every address can be registered."""

from __future__ import annotations

from vllm_rfork.devices.base import DeviceSide


class CpuSide(DeviceSide):
    """See the module's docstring; all answers are the base's."""
