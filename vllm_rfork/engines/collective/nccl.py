"""Groups of two over NCCL, for CUDA memory.

NCCL's kernels run on the seed's GPU. They get a stream of the lowest priority and few thread blocks; torch's own
streams have the same priority, so what limits the effect on inference is the number of blocks.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_rfork.engines.collective import device_group
from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.cuda import Cuda
from vllm_rfork.engines.collective.group import Backend, Group
from vllm_rfork.engines.collective.nccl_library import Nccl


class NcclBackend(Backend):
    """NCCL and the driver on one GPU."""

    name: ClassVar[str] = "nccl"
    captures: ClassVar[bool] = True

    def __init__(self, index: int) -> None:
        self._nccl = Nccl()
        self._cuda = Cuda(index)

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        """Create a communicator without blocking in NCCL."""
        return device_group.create(self._nccl, self._cuda, rank, channel, deadline)

    def close(self) -> None:
        """Release the device's context."""
        self._cuda.release()
