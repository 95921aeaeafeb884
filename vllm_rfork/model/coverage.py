"""Proof that post-processing lost none of the loaded weights, before its result is published (``runtime`` layout).

Post-processing replaces, repacks and empties weights. The traversal usually finds what it derives. If it does not (a
packed copy inside a native object), the remaining tensors are equal on both sides, and the model that computes from
the hidden copy is wrong. So each loaded tensor must still be there, or enough new bytes must have appeared nearby.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from vllm_rfork.errors import ForkError
from vllm_rfork.model.traversal import Leaf

#: A replacement has at least this share of the bytes that it replaces. Repacking keeps them all, and what it drops
#: (group indices, zero points) is small; a bias or a scale that stays behind is far less.
REPLACED_SHARE = 0.5
#: How many levels above the module that lost a weight its replacement may lie: a latent-attention projection is folded
#: into the attention's ``impl``, two levels away.
LEVELS_UP = 2


@dataclass(frozen=True)
class TensorSize:
    """One tensor at one moment, as far as it shows a replacement; a tensor on the meta device has a size too."""

    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def tensor_sizes(leaves: Iterable[Leaf]) -> dict[str, TensorSize]:
    """The tensors among ``leaves``, by name."""
    return {
        leaf.name: TensorSize(leaf.value.numel() * leaf.value.element_size(), leaf.value.dtype, tuple(leaf.value.shape))
        for leaf in leaves
        if isinstance(leaf.value, torch.Tensor) and not isinstance(leaf.value, nn.parameter.UninitializedTensorMixin)
    }


def check_accounted(loaded: dict[str, TensorSize], runtime: dict[str, TensorSize]) -> None:
    """Prove that each tensor in ``loaded`` is still there in ``runtime``, or that something replaced it.

    Raises:
        ForkError: names the tensors that disappeared without a replacement.
    """
    # A single number becomes a value or another single number, both of which the traversal sees: scales of a KV cache
    # are placeholders that post-processing reads and deletes.
    lost = {
        name: size.nbytes
        for name, size in loaded.items()
        if size.nbytes and not _nbytes(runtime, name) and math.prod(size.shape) > 1
    }
    if not lost:
        return
    made = {name: size.nbytes for name, size in runtime.items() if size.nbytes and loaded.get(name) != size}
    # A tensor that was repacked in place counts on both sides, or its growth would pay for a neighbour's loss.
    spent = {name: size.nbytes for name, size in loaded.items() if size.nbytes and (name in made or name in lost)}
    gained, wanted = _by_owner(made), _by_owner(spent)
    orphans = [
        name for name in lost if not any(gained[owner] >= wanted[owner] * REPLACED_SHARE for owner in _owners(name))
    ]
    if orphans:
        more = f" and {len(orphans) - 5} more" if len(orphans) > 5 else ""
        raise ForkError(f"post-processing emptied {', '.join(orphans[:5])}{more}, and no other tensor replaces them")


def _nbytes(sizes: dict[str, TensorSize], name: str) -> int:
    return sizes[name].nbytes if name in sizes else 0


def _owners(name: str) -> Iterator[str]:
    """The module of ``name`` and those above it, nearest first, up to the layer of the model that contains it."""
    for owner in itertools.islice(_above(name), LEVELS_UP + 1):
        yield owner
        if owner.rpartition(".")[2].isdigit():  # a layer of a list: tensors of its neighbours do not replace its own
            return


def _above(name: str) -> Iterator[str]:
    """Every module around ``name``, nearest first, without the model itself."""
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
