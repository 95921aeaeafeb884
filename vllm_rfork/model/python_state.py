"""The Python-side state of a model: plain values that loading and post-processing set beside the tensors.

A memory copy does not carry them, so they travel in the manifest: the values that changed between the model as built
and the moment of publication, and the names that had a plain value before and have none now. The receiver sets its own
values to the same, or refuses. Small numpy arrays, sets and bytes travel likewise
(:mod:`~vllm_rfork.model.value_codec`); of larger ones, and of what cannot be set, a text is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from vllm_rfork.errors import ForkError
from vllm_rfork.model.traversal import Leaf, Opaque
from vllm_rfork.model.value_codec import Plain

#: Suffixes of names whose values are compared and never set.
COMPARED = (".<member>", ".<digest>", ".<value>", ".<native>", ".<opaque>")


def state_in(leaves: Iterable[Leaf]) -> dict[str, Plain]:
    """The plain values among ``leaves``, by name."""
    return {leaf.name: leaf.value for leaf in plain_leaves(leaves)}


def changed_state(before: dict[str, Plain], after: dict[str, Plain]) -> dict[str, Plain]:
    """The values in ``after`` that are new or different."""
    return {name: value for name, value in after.items() if name not in before or not is_same(before[name], value)}


def gone_state(before: dict[str, Plain], after: dict[str, Plain]) -> tuple[str, ...]:
    """The names in ``before`` alone, sorted: deleted, or replaced by a tensor or an object."""
    return tuple(sorted(before.keys() - after.keys()))


def check_passed_on(state: dict[str, Plain]) -> None:
    """Prove, as far as names show, that ``state`` can be set on a model that has just been built.

    Raises:
        ForkError: names values that can only be compared: members of enumerations, large values, native objects.
    """
    if stuck := [name for name in state if name.endswith(COMPARED)]:
        more = f" and {len(stuck) - 5} more" if len(stuck) > 5 else ""
        raise ForkError(f"loading set {', '.join(stuck[:5])}{more}, which cannot be passed on")


def plain_leaves(leaves: Iterable[Leaf]) -> Iterator[Leaf]:
    """The plain values among ``leaves``; an opaque object is represented by its kind."""
    for leaf in leaves:
        if isinstance(leaf.value, Opaque):
            yield Leaf(f"{leaf.name}.<opaque>", (), "opaque", leaf.value.kind)
        elif not isinstance(leaf.value, torch.Tensor):
            yield leaf


def is_same(one: Plain, other: Any) -> bool:
    """True if two values are equal and of one type."""
    return type(one) is type(other) and one == other
