"""The device backend: everything that the package needs from a type of device. The base class is host memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_rfork.devices.allocator_blocks import Block, BlockMap, blocks_of
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Region

#: ``private_format`` of a tensor whose bytes are laid out as its shape and strides describe.
PLAIN = 0


class DeviceBackend:
    """One device of this process: host memory, unless a subclass overrides it."""

    #: The environment variable that selects and renumbers the devices of a process; empty if there is none.
    visible_variable: ClassVar[str] = ""
    #: The environment variables that configure the caching allocator; the first one that is set counts.
    allocator_variables: ClassVar[tuple[str, ...]] = ()
    #: The reason why engines cannot keep expandable segments registered; None if they can.
    expandable_obstacle: ClassVar[str | None] = None
    #: Copies and kernels overlap: the device has its own copy engine.
    has_copy_engine: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def index(self) -> int:
        """The device's number within the process, that is, among the visible devices."""
        return 0

    @property
    def with_index(self) -> torch.device:
        """The device with its index: without one, ``cuda`` means the current device of the calling thread."""
        return torch.device(self.device.type, self.index)

    @property
    def name(self) -> str:
        """``cpu``, ``cuda:1``: the device as ``EngineConfig`` takes it, numbered within the process."""
        return "cpu"

    def physical_id(self, environment: Mapping[str, str] | None = None) -> str:
        """The device's number on the host, or the identifier that the variable lists. For people and logs.

        Raises:
            ForkError: the variable lists fewer devices.
        """
        variable = (os.environ if environment is None else environment).get(self.visible_variable, "")
        listed = [entry.strip() for entry in variable.split(",") if entry.strip()]
        if not listed:
            return str(self.index)
        if self.index >= len(listed):
            raise ForkError(f"there is no {self.name}: {self.visible_variable}={variable} lists {len(listed)} devices")
        return listed[self.index]

    def set_current(self) -> None:
        """Make this the calling thread's current device; a new thread begins with the first one."""

    def synchronize(self) -> None:
        """Wait for all queued work: layout conversions must have finished before memory is registered or digested."""

    def empty_cache(self) -> None:
        """Return the caching allocator's unused memory to the device."""

    def private_format(self, tensor: torch.Tensor) -> int:
        """The number of ``tensor``'s private layout; :data:`PLAIN` if it has none."""
        return PLAIN

    def empty_in_format(self, shape: Sequence[int], dtype: torch.dtype, private_format: int) -> torch.Tensor:
        """An uninitialised tensor on this device with the layout ``private_format``.

        Raises:
            ForkError: this device has no such layout.
        """
        if private_format != PLAIN:
            raise ForkError(f"{self.name} has no private layout {private_format}")
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def extent(self, tensor: torch.Tensor) -> tuple[int, int]:
        """The addresses of the first byte of a non-empty tensor and of the byte after its last.

        Raises:
            ForkError: a view within a private layout, which has no address of its own.
        """
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return start, start + (last + 1) * tensor.element_size()

    def bytes_of(self, tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The bytes from ``start`` to ``end`` (exclusive), as a 1-D uint8 tensor that shares and keeps the memory.

        Args:
            tensor: its storage contains all of them.
            start, end: absolute addresses.
        """
        storage = tensor.untyped_storage()
        data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return data.set_(storage, start - storage.data_ptr(), (end - start,), (1,))

    def alignment(self, environment: Mapping[str, str] | None = None) -> int:
        """Registered memory must begin at a multiple of this many bytes."""
        return 1

    def blocks(self) -> list[Block]:
        """The caching allocator's blocks on this device, by address; empty for host memory.

        Raises:
            ForkError: another allocator is in use, and it does not list its blocks.
        """
        try:
            return blocks_of(self._snapshot(), self.index)
        except RuntimeError as error:
            raise ForkError(f"the allocator of {self.name} does not list its memory: {error}") from error

    def _snapshot(self) -> Iterable[Mapping[str, Any]]:
        """The caching allocator's segments, as torch's ``memory_snapshot`` returns them."""
        return ()

    def registration_obstacle(
        self, regions: Iterable[Region] = (), environment: Mapping[str, str] | None = None
    ) -> str | None:
        """The reason why engines cannot keep memory of this device registered; None if they can.

        Args:
            regions: the memory to register. If it is empty, the allocator's configuration decides.
            environment: instead of the process's.
        """
        if self.expandable_obstacle is None:
            return None
        given = list(regions)
        if not given:
            return self._allocator_obstacle(os.environ if environment is None else environment)
        blocks = BlockMap(self.blocks())
        if any(block.expandable for block in map(blocks.holding, given) if block is not None):
            return f"the weights lie in expandable segments: {self.expandable_obstacle}"
        return None

    def _allocator_obstacle(self, environment: Mapping[str, str]) -> str | None:
        """The setting of the caching allocator that prevents registration, if there is one."""
        for variable in self.allocator_variables:
            if value := environment.get(variable, ""):
                options = dict(option.partition(":")[::2] for option in value.split(","))
                chosen = {key.strip(): text.strip().lower() for key, text in options.items()}
                if chosen.get("expandable_segments") == "true":
                    return f"{variable}={value} makes memory expandable: {self.expandable_obstacle}"
                if chosen.get("backend") == "cudamallocasync":
                    return f"{variable}={value} takes memory from the driver's pool, which other processes cannot open"
                return None
        return None
