"""What a device can do, in the one form in which the rest of the package asks for it.

Must not know a model, an engine or vLLM. The answers for plain host memory stand here; a backend overrides what it
does otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from vllm_rfork.devices.allocator_blocks import Block, BlockMap, blocks_of
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Region

#: ``private_format`` of a tensor whose bytes lie as its shape and strides say.
PLAIN = 0


class DeviceSide:
    """One device of this process, host memory unless a subclass says otherwise."""

    #: The variable that chooses and renumbers this backend's devices for a process; empty where there is none.
    visible_variable: ClassVar[str] = ""
    #: The variables that configure the backend's caching allocator; the first that is set counts.
    allocator_variables: ClassVar[tuple[str, ...]] = ()
    #: Why engines cannot keep expandable segments registered; empty where they can.
    expandable_refused: ClassVar[str] = ""

    #: Copies into this memory and work on it go on beside each other, without a processor's part in either.
    copies_by_itself: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def index(self) -> int:
        """The device's number as this process counts, within the variable that chooses visible devices."""
        return 0

    @property
    def numbered(self) -> torch.device:
        """The same device for every thread: one without a number is whichever is the asking thread's own."""
        return torch.device(self.device.type, self.index)

    @property
    def text(self) -> str:
        """``cpu``, ``cuda:1``: what engines are told. The number counts as this process does, not as the host does."""
        return "cpu"

    def physical_id(self, environment: Mapping[str, str] | None = None) -> str:
        """How the host calls this device: its number, or the identifier that the variable lists. For people and logs.

        Raises:
            ForkError: the variable lists fewer devices.
        """
        variable = (os.environ if environment is None else environment).get(self.visible_variable, "")
        listed = [entry.strip() for entry in variable.split(",") if entry.strip()]
        if not listed:
            return str(self.index)
        if self.index >= len(listed):
            raise ForkError(f"{self.text} counts within {self.visible_variable}={variable}, which lists {len(listed)}")
        return listed[self.index]

    def use(self) -> None:
        """Make this the calling thread's device; a thread begins with the backend's first one."""

    def synchronize(self) -> None:
        """Wait for everything that was queued: asynchronous layout conversions must have finished before an address is
        registered or a byte is digested."""

    def empty_cache(self) -> None:
        """Give memory that the caching allocator holds and nobody uses back to the device."""

    def private_format(self, tensor: torch.Tensor) -> int:
        """The number of the private layout that ``tensor``'s bytes lie in; :data:`PLAIN` where there is none."""
        return PLAIN

    def empty_in_format(self, shape: Sequence[int], dtype: torch.dtype, private_format: int) -> torch.Tensor:
        """An uninitialised tensor here whose bytes lie in ``private_format``.

        Raises:
            ForkError: this device has no such layout.
        """
        if private_format != PLAIN:
            raise ForkError(f"{self.text} has no private layout {private_format}")
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def extent(self, tensor: torch.Tensor) -> tuple[int, int]:
        """First and one-past-last byte address that a non-empty tensor occupies.

        Raises:
            ForkError: a view whose place within a private layout cannot be told.
        """
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return start, start + (last + 1) * tensor.element_size()

    def bytes_of(self, tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """The live bytes from address ``start`` to before ``end`` as a 1-D uint8 tensor, which keeps them alive.

        Args:
            tensor: one whose storage holds all of them.
            start, end: absolute addresses.
        """
        storage = tensor.untyped_storage()
        data = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return data.set_(storage, start - storage.data_ptr(), (end - start,), (1,))

    def alignment(self, environment: Mapping[str, str] | None = None) -> int:
        """At which multiples, in bytes, memory that is registered has to begin."""
        return 1

    def blocks(self) -> list[Block]:
        """The caching allocator's blocks on this device, by address; none for host memory.

        Raises:
            ForkError: another allocator is in its place, which does not tell.
        """
        try:
            return blocks_of(self._snapshot(), self.index)
        except RuntimeError as error:
            raise ForkError(f"the allocator of {self.text} does not tell where its memory lies: {error}") from error

    def _snapshot(self) -> Iterable[Mapping[str, Any]]:
        """The caching allocator's segments, as torch describes them."""
        return ()

    def unregistrable(self, regions: Iterable[Region] = (), environment: Mapping[str, str] | None = None) -> str:
        """Why engines cannot keep memory of this device registered; empty where they can.

        Args:
            regions: the memory in question. Where none is given, the allocator's configuration decides.
            environment: instead of the process's.
        """
        if not self.expandable_refused:
            return ""
        asked = list(regions)
        if not asked:
            return self._refused_by(os.environ if environment is None else environment)
        blocks = BlockMap(self.blocks())
        if any(block.expandable for block in map(blocks.holding, asked) if block is not None):
            return f"the weights lie in expandable segments: {self.expandable_refused}"
        return ""

    def _refused_by(self, environment: Mapping[str, str]) -> str:
        """Why the allocator's configuration rules registering out; empty where it does not."""
        for variable in self.allocator_variables:
            if value := environment.get(variable, ""):
                options = dict(option.partition(":")[::2] for option in value.split(","))
                chosen = {key.strip(): text.strip().lower() for key, text in options.items()}
                if chosen.get("expandable_segments") == "true":
                    return f"{variable}={value} makes memory expandable: {self.expandable_refused}"
                if chosen.get("backend") == "cudamallocasync":
                    return f"{variable}={value} takes memory from the driver's pool, which other processes cannot open"
                return ""
        return ""
