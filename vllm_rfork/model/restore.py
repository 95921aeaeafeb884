"""Give a model the small tensors and the Python-side state of the seed's: whatever a copy of memory does not carry."""

from __future__ import annotations

import inspect
import types
from collections import UserList, deque
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from vllm_rfork.errors import ForkError, ManifestMismatch, VerificationError
from vllm_rfork.logs.quoting import printable
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.model.python_state import is_same, plain_leaves, state_in
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.tensors import TensorInventory, raw_bytes
from vllm_rfork.model.traversal import MODULE_INTERNAL, Leaf, walk
from vllm_rfork.model.value_codec import Plain, assign_in_place, decode, encode_plain, family, is_plain

#: Attributes of nn.Module itself: torch reads some of them in every call (``_compiled_call_impl``).
_MODULE_CLASS = frozenset(vars(nn.Module))


def restore(
    model: nn.Module,
    tensors: TensorInventory,
    seed: Manifest,
    rules: ModelRules,
    *,
    built: dict[str, Plain] | None,
    in_time: Callable[[], None],
    settle: Callable[[], None],
) -> None:
    """Make everything of ``model`` that a fork has not copied equal to the seed's.

    Args:
        tensors: of ``model``; their spans contain the seed's bytes already.
        built: the model's plain values as built, if it has been post-processed from other bytes since.
        in_time: raises ForkError if there is no time left.
        settle: called when the state is set, for checks that wait for it.

    Raises:
        ForkError: something cannot be made equal.
        VerificationError: a small tensor does not contain the seed's bytes in the end.
    """
    apply_inline(tensors, seed)
    if built is None:
        apply_state(model, seed.state, in_time, rules=rules)
    else:
        match_state(model, built, seed.state, seed.state_gone, in_time, rules=rules)
    settle()
    check_inline(tensors, seed)


def apply_inline(inventory: TensorInventory, manifest: Manifest) -> None:
    """Copy the seed's inline bytes into this process's tensors. Pairing has compared their shapes and aliases already.

    Raises:
        ForkError: bytes are missing or of the wrong length.
    """
    for entry in manifest.tensors:
        target = inventory.inline.get(entry.name)
        if target is None:
            continue
        nbytes = target.numel() * target.element_size()
        if entry.inline is None or len(entry.inline) != nbytes:
            raise ForkError(f"the seed sent no usable bytes for tensor {entry.name}")
        source = torch.frombuffer(bytearray(entry.inline), dtype=torch.uint8).view(target.dtype).view(target.shape)
        target.copy_(source)


def check_inline(inventory: TensorInventory, manifest: Manifest) -> None:
    """Prove that inline tensors contain the seed's bytes, after everything else has been done to the model.

    Raises:
        VerificationError: names those that do not.
    """
    sent = {entry.name: entry.inline for entry in manifest.tensors}
    if wrong := [name for name, tensor in inventory.inline.items() if raw_bytes(tensor) != sent.get(name)]:
        raise VerificationError(f"{len(wrong)} small tensors do not contain the seed's bytes: {', '.join(wrong[:5])}")


def apply_state(
    model: nn.Module,
    state: dict[str, Any],
    in_time: Callable[[], None] = lambda: None,
    built: Mapping[str, Plain] = MappingProxyType({}),
    *,
    rules: ModelRules,
    found: Mapping[str, Leaf] | None = None,
) -> None:
    """Set the values in ``state``, which a seed sent, in ``model``.

    A name that a traversal of this model does not list is set if loading may have added it to a registered module. A
    value replaces only one of its family. Everything is checked before anything is set.

    Args:
        in_time: raises ForkError when there is no time left.
        built: this model's state as built; its names may be set again where something else has taken their place.
        rules: of the traversal.
        found: the plain leaves of a traversal of this model as it is, by name; None to make one.

    Raises:
        ForkError: a place does not exist here or cannot be written, or a value is not plain or of another family.
    """
    if not state:
        return
    leaves = _leaves(model, rules, in_time) if found is None else found
    modules = dict(model.named_modules())
    places: list[tuple[Leaf, Any]] = []
    for name, value in state.items():
        in_time()
        if not is_plain(value):
            _check_data(name, value)
        here = leaves.get(name)
        if here is None:
            places.append((_unlisted(name, modules, value, built, rules), value))
        elif not is_same(here.value, value):
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
    leaves = _leaves(model, rules, in_time)
    now = {name: leaf.value for name, leaf in leaves.items()}
    # Values that post-processing wrote here and not on the seed are set back to what they were as built.
    other = {name: value for name, value in wanted.items() if name not in now or not is_same(now[name], value)}
    if other:
        apply_state(model, other, in_time, built, rules=rules, found=leaves)
        now = state_in(walk(model, rules))  # a setter may have done something else
    differences = [f"state {name}: only the receiver has it" for name in sorted(now.keys() - wanted.keys())]
    differences += [f"state {name}: only the seed has it" for name in sorted(wanted.keys() - now.keys())]
    differences += [
        f"state {name}: {_shown(wanted[name])} on the seed, {_shown(now[name])} on the receiver"
        for name in sorted(wanted.keys() & now.keys())
        if not is_same(now[name], wanted[name])
    ]
    if differences:
        raise ManifestMismatch(differences)


def _leaves(model: nn.Module, rules: ModelRules, in_time: Callable[[], None]) -> dict[str, Leaf]:
    """The plain leaves of a traversal, by name."""
    leaves: dict[str, Leaf] = {}
    for leaf in plain_leaves(walk(model, rules)):
        in_time()
        leaves[leaf.name] = leaf
    return leaves


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
