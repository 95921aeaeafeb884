"""The Python-side state of a model: plain values that loading and post-processing set beside the tensors.

A memory copy does not carry them, so they travel in the manifest: the values that changed between the model as built
and the moment of publication, and the names that had a plain value before and have none now. The receiver sets its own
values to the same, or refuses. Small numpy arrays, sets and bytes travel likewise
(:mod:`~vllm_rfork.model.value_codec`); of larger ones, and of what cannot be set, a text is compared.
"""

from __future__ import annotations

import inspect
import types
from collections import UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vllm_rfork.errors import ForkError, ManifestMismatch
from vllm_rfork.logs.quoting import printable
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.traversal import MODULE_INTERNAL, Leaf, Opaque, walk
from vllm_rfork.model.value_codec import Plain, assign_in_place, decode, encode_plain, family, is_plain

#: Suffixes of names whose values are compared and never set.
COMPARED = (".<member>", ".<digest>", ".<value>", ".<native>", ".<opaque>")
#: Attributes of nn.Module itself: torch reads some of them in every call (``_compiled_call_impl``).
_MODULE_CLASS = frozenset(vars(nn.Module))


def state_in(leaves: Iterable[Leaf]) -> dict[str, Plain]:
    """The plain values among ``leaves``, by name."""
    return {leaf.name: leaf.value for leaf in _plain(leaves)}


def changed_state(before: dict[str, Plain], after: dict[str, Plain]) -> dict[str, Plain]:
    """The values in ``after`` that are new or different."""
    return {name: value for name, value in after.items() if name not in before or not _same(before[name], value)}


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


def apply_state(
    model: nn.Module,
    state: dict[str, Any],
    in_time: Callable[[], None] = lambda: None,
    built: Mapping[str, Plain] = MappingProxyType({}),
    *,
    rules: ModelRules,
) -> None:
    """Set the values in ``state``, which a seed sent, in ``model``.

    A name that a traversal of this model does not list is set if loading may have added it to a registered module. A
    value replaces only one of its family. Everything is checked before anything is set.

    Args:
        in_time: raises ForkError when there is no time left.
        built: this model's state as built; its names may be set again where something else has taken their place.
        rules: of the traversal.

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
            if not _may_become(here.value, value):
                raise ForkError(
                    f"state {printable(name)} of the seed is a {family(value)}, here it is a {family(here.value)}",
                )
            places.append((here, value))
    for place, value in places:
        in_time()
        _assign(place, value)


def match_state(
    model: nn.Module,
    built: dict[str, Plain],
    state: dict[str, Any],
    gone: Iterable[str],
    in_time: Callable[[], None] = lambda: None,
    *,
    rules: ModelRules,
) -> None:
    """Give ``model``, which was post-processed from other bytes, the state of the seed's, and verify it.

    Args:
        built: this model's state as built, which equals the seed's because their fingerprints are equal.
        state: the seed's changes since then.
        gone: names that had a plain value when the seed was built and have none now.
        in_time, rules: as of :func:`apply_state`.

    Raises:
        ManifestMismatch: state differs that cannot be set; lists every difference.
        ForkError: a place cannot be written.
    """
    wanted = {**built, **state}
    for name in gone:
        wanted.pop(name, None)
    now = state_in(walk(model, rules))
    # Values that post-processing wrote here and not on the seed are set back to what they were as built.
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
        raise ManifestMismatch(differences)


def _unlisted(
    name: str, modules: Mapping[str, nn.Module], value: Any, built: Mapping[str, Plain], rules: ModelRules
) -> Leaf:
    """The place of an attribute that loading added, or that had a plain value as built and has none now."""
    owner_name, _, key = name.rpartition(".")
    owner = modules.get(owner_name)
    was_plain = name in built and _may_become(built[name], value)
    if owner is None or not (_may_be_added(owner, key, value, rules) or (was_plain and key in vars(owner))):
        raise ForkError(f"state {printable(name)} of the seed has no place here")
    return Leaf(name, owner, key, None)


def _may_be_added(module: nn.Module, key: str, value: Plain, rules: ModelRules) -> bool:
    """True if loading may have added attribute ``key`` to ``module``, so that a traversal lists it.

    Existing attributes of the module, its class's methods and torch's own attributes are never replaced. A plain value
    on the class, such as a flag, may be overridden by one of its family.
    """
    if not key.isidentifier() or key.startswith("__") or rules.is_placeholder(module):
        return False
    if key in MODULE_INTERNAL or key in _MODULE_CLASS or rules.is_scratch(module, key):
        return False
    if any(key in each for each in (vars(module), module._parameters, module._buffers, module._modules)):
        return False
    on_class = inspect.getattr_static(type(module), key, None)
    return is_plain(on_class) and _may_become(encode_plain(on_class), value)


def _may_become(old: Plain, new: Plain) -> bool:
    """True if loading may have replaced ``old`` by ``new``: of one family, or None on either side."""
    return len({family(old), family(new)} - {"none"}) < 2


def _assign(leaf: Leaf, value: Plain) -> None:
    """Set ``value`` at the place of ``leaf``; an array or a set of the same kind is overwritten in place.

    Raises:
        ForkError: the place cannot be written (a closure, a tuple, a read-only attribute), or the value is not one.
    """
    new = decode(value)
    by_index = isinstance(leaf.owner, (Mapping, list, deque, UserList))
    try:
        if isinstance(leaf.owner, (tuple, types.CellType)):
            raise TypeError(f"a {type(leaf.owner).__name__} cannot be written")
        if isinstance(value, dict):
            old = leaf.owner[leaf.key] if by_index else getattr(leaf.owner, leaf.key, None)
            if assign_in_place(old, new):
                return
        if by_index:
            leaf.owner[leaf.key] = new
        else:
            setattr(leaf.owner, leaf.key, new)
    except Exception as error:
        # Setters run their own code, and a module raises KeyError for a name that it uses otherwise.
        raise ForkError(f"state {leaf.name} of the seed cannot be set here: {error}") from error


def _check_data(name: str, value: Any) -> None:
    try:
        decode(value)
    except ForkError as error:
        text = f"state {printable(name)} of the seed is not a plain value: {error}"
        raise ForkError(text) from error


def _shown(value: Any) -> str:
    """``value`` for a message; only the kind of one that is neither a number nor text."""
    return printable(repr(value)) if is_plain(value) else f"a {family(value)} {printable(str(next(iter(value), '')))}"


def _plain(leaves: Iterable[Leaf]) -> Iterator[Leaf]:
    for leaf in leaves:
        if isinstance(leaf.value, Opaque):
            yield Leaf(f"{leaf.name}.<opaque>", (), "opaque", leaf.value.kind)
        elif not isinstance(leaf.value, torch.Tensor):
            yield leaf


def _same(one: Plain, other: Any) -> bool:
    return type(one) is type(other) and one == other
