"""A bounce buffer: ordinary device memory that a transfer reads into, for weights that no engine can register.

Weights of a worker with sleep mode lie in a pool whose pages are unmapped while it sleeps. Each batch of a transfer is
read into the buffer and then copied to its place, on the device.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from vllm_rfork.devices.registry import device_backend
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.model.tensors import TensorInventory

#: Bytes of the largest buffer, and of the smallest that is worth a transfer.
MAX_NBYTES, MIN_NBYTES = 2 * 1024**3, 16 * 1024**2


class BounceBuffer:
    """``Landing`` of :mod:`vllm_rfork.fork.transfer`: one allocation in front of the spans of an inventory.

    Args:
        tensors: whose spans are filled.
        device: of the spans.
        nbytes: the bytes that will be read in all; the buffer is never larger.

    Raises:
        ForkError: the device has no memory left for the smallest buffer.
    """

    def __init__(self, tensors: TensorInventory, device: torch.device, nbytes: int) -> None:
        self._side = device_backend(device)
        self._data = _allocated(device, max(1, min(nbytes, MAX_NBYTES)))
        self._spans = sorted(tensors.spans, key=lambda span: span.address)
        self._starts = [span.address for span in self._spans]

    @property
    def nbytes(self) -> int:
        """The size of the buffer, and so of the largest batch."""
        return int(self._data.numel())

    @property
    def regions(self) -> tuple[Region, ...]:
        """The memory to register."""
        return (Region(self._data.data_ptr(), self.nbytes),)

    @property
    def memory(self) -> Any:
        """An object that keeps the buffer alive."""
        return self._data

    def redirected(self, batch: Sequence[Segment]) -> list[Segment]:
        """``batch`` with addresses in the buffer in place of the local ones, one after another."""
        place, found = self._data.data_ptr(), []
        for segment in batch:
            found.append(segment._replace(local=place))
            place += segment.nbytes
        return found

    def deliver(self, batch: Sequence[Segment]) -> None:
        """Copy what has been read for ``batch`` to its place, and wait for it: the next read overwrites the buffer."""
        position = 0
        for segment in batch:
            span = self._spans[bisect.bisect_right(self._starts, segment.local) - 1]
            offset = segment.local - span.address
            source = self._data[position : position + segment.nbytes]
            span.data[offset : offset + segment.nbytes].copy_(source)
            position += segment.nbytes
        self._side.synchronize()


def _allocated(device: torch.device, nbytes: int) -> torch.Tensor:
    """A buffer of ``nbytes`` bytes, or of a half, a quarter and so on, as far as the device has memory."""
    while True:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if nbytes // 2 < MIN_NBYTES:
                raise ForkError(f"no memory for a buffer of {nbytes} bytes on {device}: {error}") from error
            nbytes //= 2
