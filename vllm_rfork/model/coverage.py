"""What a seed has to account for before it may offer post-processed memory (the ``runtime`` layout).

Post-processing replaces, repacks and empties weights. What it derives usually lies in tensors that the walk finds;
where it does not (a packed copy inside a native object), the tensors that are left are equal on both sides and the
model that computes from the hidden copy is wrong. So everything that was loaded must still be there, or something must
have taken its place nearby. And nothing of what is offered may be an address: it would mean other memory elsewhere.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vllm_rfork.devices.base import DeviceSide
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.model.tensors import Collection
from vllm_rfork.model.traversal import Leaf, Plain, walk
from vllm_rfork.model.value_codec import integers

#: A replacement has at least this share of the bytes that it replaces. Repacking keeps them all, and what it drops
#: beside them (group indices, zero points) is small; a bias or a scale that stays behind is far less.
REPLACED_SHARE = 0.5
#: How many levels above the module that lost a weight its replacement may lie: a latent-attention projection is folded
#: into the attention's ``impl``, two levels away.
LEVELS_UP = 2
#: So many integers are compared at a time: some 100 MB of masks and copies.
PIECE = 1 << 23


@dataclass(frozen=True)
class Held:
    """One tensor at one moment: enough to tell whether it was replaced. Meta tensors have a size too."""

    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def held_by(model: nn.Module) -> dict[str, Held]:
    """Every tensor reachable from ``model``, by name.

    Raises:
        ForkError: the model cannot be walked.
    """
    return held_in(walk(model))


def held_in(leaves: Iterable[Leaf]) -> dict[str, Held]:
    """As :func:`held_by`, of a walk."""
    held = {}
    for leaf in leaves:
        tensor = leaf.value
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            held[leaf.name] = Held(tensor.numel() * tensor.element_size(), tensor.dtype, tuple(tensor.shape))
    return held


def check_accounted(loaded: dict[str, Held], runtime: dict[str, Held]) -> None:
    """Prove that each tensor that was ``loaded`` is still there in ``runtime``, or that something replaced it.

    Raises:
        ForkError: names the tensors that went without a replacement.
    """
    # A single number becomes a value or another single number, both of which the walk sees: scales of a KV cache are
    # placeholders that post-processing reads and deletes.
    lost = {
        name: held.nbytes
        for name, held in loaded.items()
        if held.nbytes and not _nbytes(runtime, name) and math.prod(held.shape) > 1
    }
    if not lost:
        return
    made = {name: held.nbytes for name, held in runtime.items() if held.nbytes and loaded.get(name) != held}
    # A tensor that was repacked in place counts on both sides, or its growth would pay for a neighbour's loss.
    spent = {name: held.nbytes for name, held in loaded.items() if held.nbytes and (name in made or name in lost)}
    gained, wanted = _by_owner(made), _by_owner(spent)
    orphans = [
        name for name in lost if not any(gained[owner] >= wanted[owner] * REPLACED_SHARE for owner in _owners(name))
    ]
    if orphans:
        more = f" and {len(orphans) - 5} more" if len(orphans) > 5 else ""
        raise ForkError(
            f"post-processing emptied {', '.join(orphans[:5])}{more}, and no tensor to offer took the place"
        )


def _nbytes(held: dict[str, Held], name: str) -> int:
    return held[name].nbytes if name in held else 0


def _owners(name: str) -> Iterator[str]:
    """The module that holds ``name`` and those above it, nearest first, up to the layer of the model it is in."""
    for owner in itertools.islice(_above(name), LEVELS_UP + 1):
        yield owner
        if owner.rpartition(".")[2].isdigit():  # one of a list of layers: its neighbours' tensors are no replacement
            return


def _above(name: str) -> Iterator[str]:
    """Everything that ``name`` lies in, nearest first, without the model itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _by_owner(nbytes_of: dict[str, int]) -> Counter[str]:
    """Bytes of all tensors below each module."""
    sums: Counter[str] = Counter()
    for name, nbytes in nbytes_of.items():
        for owner in _above(name):
            sums[owner] += nbytes
    return sums


def check_no_addresses(collection: Collection, state: dict[str, Plain], memory: Iterable[Region] = ()) -> None:
    """Prove that neither tensors nor values hold addresses of this process's memory.

    Args:
        collection, state: what is offered.
        memory: what addresses may point to besides what is offered, as :func:`memory_of` finds it.

    Raises:
        ForkError: names the first that does.
    """
    starts, ends = _merged([*collection.regions, *memory])
    if not starts:
        return
    for name, tensor in collection.integers.items():
        if _any_inside(tensor, starts, ends):
            raise ForkError(f"tensor {name} holds addresses of this process's memory, which mean nothing in another")
    for name, value in state.items():
        if any(_inside(number, starts, ends) for number in integers(value)):
            raise ForkError(f"state {name} is an address in this process's memory, which means nothing in another")


def memory_of(model: nn.Module, collection: Collection, side: DeviceSide) -> list[Region]:
    """Where this process's tensors lie, scratch included, which is nowhere else looked at.

    All of the allocator's memory, where it says so; the storages behind what was collected; and those of the tensors
    that modules and their helpers hold.

    Raises:
        ForkError: the allocator does not tell.
    """
    regions = [Region(block.address, block.nbytes) for block in side.blocks()]
    tensors = [span.data for span in collection.spans] + [*collection.inline.values(), *_held(model)]
    for tensor in tensors:
        try:
            storage = tensor.untyped_storage()
            address, nbytes = storage.data_ptr(), storage.nbytes()
        except (RuntimeError, NotImplementedError):  # a wrapper: its parts have been collected
            continue
        if address and nbytes:
            regions.append(Region(address, nbytes))
    return regions


def _held(model: nn.Module) -> Iterator[torch.Tensor]:
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
    """First addresses and those one past the last, of regions that do not touch, in order."""
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
    """Compared where ``tensor`` lies, and piece by piece; the few values that may be addresses are looked at here."""
    for values in tensor.reshape(-1).view(torch.int64).split(PIECE):
        suspects = values[(values >= starts[0]) & (values < ends[-1])].cpu()
        places = torch.searchsorted(torch.tensor(starts), suspects, right=True) - 1
        if bool((suspects < torch.tensor(ends)[places]).any()):
            return True
    return False
