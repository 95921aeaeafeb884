"""Proof that nothing published contains a pointer: it would be meaningless in another process."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from vllm_rfork.devices.base import DeviceBackend
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.model.tensors import TensorInventory
from vllm_rfork.model.value_codec import Plain, wide_integers

#: Number of integers that are compared at a time; masks and copies for them take about 100 MB.
PIECE = 1 << 23


def check_no_addresses(inventory: TensorInventory, state: dict[str, Plain], memory: Iterable[Region] = ()) -> None:
    """Prove that neither tensors nor values are addresses of this process's memory.

    Args:
        inventory: the tensors to publish.
        state: the plain values to publish, by name.
        memory: memory that addresses may point to besides the published regions (:func:`memory_of`).

    Raises:
        ForkError: names the first that is one.
    """
    starts, ends = _merged([*inventory.regions, *memory])
    if not starts:
        return
    for name, tensor in inventory.integers.items():
        if _any_inside(tensor, starts, ends):
            raise ForkError(f"tensor {name} contains addresses of this process's memory, invalid in any other")
    for name, value in state.items():
        if any(_inside(number, starts, ends) for number in wide_integers(value)):
            raise ForkError(f"state {name} is an address in this process's memory, invalid in any other")


def memory_of(model: nn.Module, inventory: TensorInventory, side: DeviceBackend) -> list[Region]:
    """The memory of this process's tensors, including scratch memory, which no traversal reports.

    It consists of the allocator's blocks, if the allocator lists them; the storages behind ``inventory``; and those
    of the tensors in modules and in their helpers.

    Raises:
        ForkError: the allocator cannot list its blocks.
    """
    regions = [Region(block.address, block.nbytes) for block in side.blocks()]
    tensors = [span.data for span in inventory.spans] + [*inventory.inline.values(), *_tensors_of(model)]
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            address, nbytes = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # a wrapper: its parts are in the inventory
            continue
        if address and nbytes:
            regions.append(Region(address, nbytes))
    return regions


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            yield from _tensors_in(value)
            if not isinstance(value, (nn.Module, torch.Tensor)):
                for inner in list(getattr(value, "__dict__", {}).values()):
                    yield from _tensors_in(inner)


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(each, torch.Tensor) and not each.is_meta:
            yield each


def _merged(regions: Iterable[Region]) -> tuple[list[int], list[int]]:
    """First addresses, and those one past the last, of disjoint regions in order."""
    starts: list[int] = []
    ends: list[int] = []
    for start, end in sorted((region.address, region.address + region.nbytes) for region in regions):
        if ends and start <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends


def _inside(value: int, starts: list[int], ends: list[int]) -> bool:
    number = bisect.bisect_right(starts, value) - 1
    return number >= 0 and value < ends[number]


def _any_inside(tensor: torch.Tensor, starts: list[int], ends: list[int]) -> bool:
    """Compare on the tensor's device, piece by piece; only the few values in range are copied to the host."""
    for values in tensor.reshape(-1).view(torch.int64).split(PIECE):
        suspects = values[(values >= starts[0]) & (values < ends[-1])].cpu()
        places = torch.searchsorted(torch.tensor(starts), suspects, right=True) - 1
        if bool((suspects < torch.tensor(ends)[places]).any()):
            return True
    return False
