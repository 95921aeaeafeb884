"""The Python-side state of a model: plain values that loading and post-processing leave beside the tensors.

A memory copy does not carry them, so they travel in the manifest: what changed between the structure as built and the
moment at which the seed vouches for it, and what was there before and is no plain value any more. The receiver makes
its own the same or refuses. Small arrays of numpy, sets and bytes travel likewise (``plain_values``); of larger ones,
and of what cannot be set, a text is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.logs.quoting import printable
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.traversal import Leaf, Opaque, Plain, assign, may_be_added, may_become, walk
from vllm_rfork.model.value_codec import family, from_data, is_plain

#: How names end under which something is compared, and never set.
COMPARED = (".<member>", ".<digest>", ".<value>", ".<native>", ".<opaque>")


def state_in(leaves: Iterable[Leaf]) -> dict[str, Plain]:
    """The plain values among ``leaves``, by name."""
    return {leaf.name: leaf.value for leaf in _plain(leaves)}


def changed_state(before: dict[str, Plain], after: dict[str, Plain]) -> dict[str, Plain]:
    """What loading set: values that are new or differ."""
    return {name: value for name, value in after.items() if name not in before or not _same(before[name], value)}


def check_passed_on(state: dict[str, Plain]) -> None:
    """Prove that a model that has just been built can be given ``state``, as far as names tell.

    Raises:
        ForkError: names what is compared only: enumerations' members, what is too large to travel, native objects.
    """
    if stuck := [name for name in state if name.endswith(COMPARED)]:
        more = f" and {len(stuck) - 5} more" if len(stuck) > 5 else ""
        raise ForkError(f"loading set {', '.join(stuck[:5])}{more}, which cannot be passed on")


def gone_state(before: dict[str, Plain], after: dict[str, Plain]) -> tuple[str, ...]:
    """What was a plain value and is none any more: deleted, or replaced by a tensor or an object; sorted."""
    return tuple(sorted(before.keys() - after.keys()))


def apply_state(
    model: nn.Module,
    state: dict[str, Any],
    in_time: Callable[[], None] = lambda: None,
    built: Mapping[str, Plain] = MappingProxyType({}),
    *,
    rules: ModelRules,
) -> None:
    """Make ``model`` hold ``state`` as the seed's does.

    A name that this model's own walk does not list is set where loading may have added it to a registered module
    (:func:`~vllm_rfork.model.traversal.may_be_added`), and a value replaces only one of its family.
    Everything is checked before anything is set.

    Args:
        in_time: raises ForkError when there is no time left.
        built: this model's state as built; what it lists may be set again where something else has taken its place.

    Raises:
        ForkError: a place does not exist here or cannot be written, or a value is not plain or of another family.
    """
    if not state:
        return
    leaves: dict[str, Leaf] = {}
    for leaf in _plain(walk(model, rules)):
        in_time()
        leaves[leaf.name] = leaf
    modules = dict(model.named_modules())
    places: list[tuple[Leaf, Any]] = []
    for name, value in state.items():
        in_time()
        if not is_plain(value):
            _check_data(name, value)
        here = leaves.get(name)
        if here is None:
            places.append((_unlisted(name, modules, value, built, rules), value))
        elif not _same(here.value, value):
            if not may_become(here.value, value):
                raise ForkError(
                    f"state {printable(name)} of the seed is a {family(value)}, here it is a {family(here.value)}",
                    mutated=True,
                )
            places.append((here, value))
    for place, value in places:
        in_time()
        assign(place, value)


def _unlisted(
    name: str, modules: Mapping[str, nn.Module], value: Any, built: Mapping[str, Plain], rules: ModelRules
) -> Leaf:
    """The place of an attribute that loading added and construction does not make, or that is no plain value now."""
    owner_name, _, key = name.rpartition(".")
    owner = modules.get(owner_name)
    was_plain = name in built and may_become(built[name], value)
    if owner is None or not (may_be_added(owner, key, value, rules) or (was_plain and key in vars(owner))):
        raise ForkError(f"state {printable(name)} of the seed has no place here", mutated=True)
    return Leaf(name, owner, key, None)


def match_state(
    model: nn.Module,
    built: dict[str, Plain],
    state: dict[str, Any],
    gone: Iterable[str],
    in_time: Callable[[], None] = lambda: None,
    *,
    rules: ModelRules,
) -> None:
    """Make ``model``, which was post-processed from other bytes, hold what the seed's holds; then look again.

    Args:
        built: this model's state as built, which by the fingerprint was the seed's too.
        state: the seed's changes since then.
        gone: what was plain when the seed was built and is no longer.
        in_time: as of :func:`apply_state`.

    Raises:
        ManifestMismatch: state differs that cannot be set; the error lists all of it.
        ForkError: a place cannot be written.
    """
    wanted = {**built, **state}
    for name in gone:
        wanted.pop(name, None)
    now = state_in(walk(model, rules))
    # Values that post-processing wrote here and not on the seed go back to what they were as built.
    other = {name: value for name, value in wanted.items() if name not in now or not _same(now[name], value)}
    if other:
        apply_state(model, other, in_time, built, rules=rules)
        now = state_in(walk(model, rules))  # a setter may have done something else
    differences = [f"state {name}: only the receiver has it" for name in sorted(now.keys() - wanted.keys())]
    differences += [f"state {name}: only the seed has it" for name in sorted(wanted.keys() - now.keys())]
    differences += [
        f"state {name}: {_shown(wanted[name])} on the seed, {_shown(now[name])} on the receiver"
        for name in sorted(wanted.keys() & now.keys())
        if not _same(now[name], wanted[name])
    ]
    if differences:
        error = ManifestMismatch(differences)
        error.mutated = True
        raise error


def _check_data(name: str, value: Any) -> None:
    try:
        from_data(value)
    except ForkError as error:
        text = f"state {printable(name)} of the seed is not a plain value: {error}"
        raise ForkError(text, mutated=True) from error


def _shown(value: Any) -> str:
    """``value`` for a message; only the kind of one that is no number and no text."""
    return printable(repr(value)) if is_plain(value) else f"a {family(value)} {printable(str(next(iter(value), '')))}"


def _plain(leaves: Iterable[Leaf]) -> Iterator[Leaf]:
    for leaf in leaves:
        if isinstance(leaf.value, Opaque):
            yield Leaf(f"{leaf.name}.<opaque>", (), "opaque", leaf.value.kind)
        elif not isinstance(leaf.value, torch.Tensor):
            yield leaf


def _same(one: Plain, other: Any) -> bool:
    return type(one) is type(other) and one == other
