"""Traversal of everything reachable from a model: the one place that says where tensors and state hide.

Tensors hide in parameters, buffers, plain attributes, lists, dicts, helper objects that are not modules, the closures
of functions in any of these, weak references, and attributes of tensors. The walk is breadth-first. Its order depends
on registration order and sorted attribute names only, never on object addresses: a value that is reached in several
ways gets the shortest name, and two processes that build the same model give every leaf the same name. There is no
bound on depth.

:class:`~vllm_rfork.model.rules.ModelRules` say what is skipped: scratch memory, placeholders, objects of foreign
packages and of the process. Attributes of text, classes and Python modules are skipped, too. All other values end in a
leaf, an :class:`Opaque` one where memory cannot be seen.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import enum
import inspect
import os
import threading
import types
import weakref
from collections import UserDict, UserList, deque
from collections.abc import ItemsView, Iterator, Mapping, Set, ValuesView
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vllm_rfork.errors import ForkError
from vllm_rfork.model import value_codec
from vllm_rfork.model.closures import keeps_own_results, opened
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.value_codec import Plain

__all__ = [
    "MAX_LEAVES",
    "MAX_NAME",
    "MAX_OBJECTS",
    "Leaf",
    "Opaque",
    "Plain",
    "assign",
    "may_be_added",
    "walk",
]

#: More leaves and objects than any model has: a walk that leaves the model would otherwise not end.
MAX_LEAVES = 5_000_000
MAX_OBJECTS = 2_000_000
#: How long a name may become, in characters: some 150 steps. vLLM's longest has 150 characters.
MAX_NAME = 1_000

#: nn.Module's own bookkeeping; of it hooks alone can hold something.
_MODULE_INTERNAL = frozenset(vars(nn.Module()))
#: And what stands on its class: torch reads some of it in every call (``_compiled_call_impl``).
_MODULE_CLASS = frozenset(vars(nn.Module))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, threading.local)


class _Below(enum.Enum):
    """What counts of plain values below a place; tensors and arrays count everywhere."""

    MODULE = enum.auto()
    #: A layer's quantization may hold its scales; its plain values are settings, which the fingerprint covers.
    CONFIG = enum.auto()
    #: Tensors carry what loaders need, and some methods' scales.
    TENSOR = enum.auto()


@dataclass(frozen=True)
class Opaque:
    """Stands for an object whose memory cannot be seen: packed weights may lie in it."""

    kind: str


@dataclass(frozen=True)
class Leaf:
    """A tensor, a plain value, another value as plain data, or :class:`Opaque`: where it is called ``name``, and the
    ``owner`` and ``key`` under which it is held.
    """

    name: str
    owner: Any
    key: Any
    value: Any


def walk(model: nn.Module, rules: ModelRules) -> Iterator[Leaf]:
    """Every tensor and plain value reachable from ``model``, except what ``rules`` skip.

    Aliased tensors come once per name; helper objects and hidden modules once, under the shortest name. No two leaves
    have the same name.

    Raises:
        ForkError: there are more than ``MAX_LEAVES`` or ``MAX_OBJECTS``, or longer names than ``MAX_NAME``: the walk
            has left the model; or an array is too large to be compared; or an object of the model's raised while it
            was looked at.
    """
    leaves = _Walker(model, rules).leaves()
    names: set[str] = set()
    while True:
        try:
            leaf = next(leaves)
        except StopIteration:
            return
        except ForkError:
            raise
        except Exception as error:
            # Mappings, slots and wrapper tensors run their own code, and a model that loads must not fail for it.
            raise ForkError(f"the model's attributes cannot be read: {type(error).__name__}: {error}") from error
        if len(names) >= MAX_LEAVES:
            raise ForkError(f"more than {MAX_LEAVES} tensors and values are reachable from the model")
        name = leaf.name
        while name in names:  # a method's <self>, for instance, and a variable of that name in its closure
            name += "'"
        names.add(name)
        yield leaf if name == leaf.name else dataclasses.replace(leaf, name=name)


def assign(leaf: Leaf, value: Plain) -> None:
    """Put ``value`` where ``leaf`` is held; arrays and sets of the same kind get its content where they stand.

    Raises:
        ForkError: the place cannot be written (a closure, a tuple, a read-only attribute), or there is no such value.
    """
    made = value_codec.from_data(value)
    by_index = isinstance(leaf.owner, (Mapping, list, deque, UserList))
    try:
        if isinstance(leaf.owner, (tuple, types.CellType)):
            raise TypeError(f"a {type(leaf.owner).__name__} cannot be written")
        if isinstance(value, dict):
            held = leaf.owner[leaf.key] if by_index else getattr(leaf.owner, leaf.key, None)
            if value_codec.put_into(held, made):
                return
        if by_index:
            leaf.owner[leaf.key] = made
        else:
            setattr(leaf.owner, leaf.key, made)
    except Exception as error:
        # Setters run their own code, and a module raises KeyError for a name that it has otherwise.
        raise ForkError(f"state {leaf.name} of the seed cannot be set here: {error}") from error


def may_be_added(module: nn.Module, key: str, value: Plain, rules: ModelRules) -> bool:
    """Whether loading may have added attribute ``key`` with the plain ``value`` to ``module``: :func:`walk` lists it.

    What the module has under that name already, its class's methods and torch's bookkeeping are never replaced. A value
    that stands on the class, such as a flag, may be overridden by one of its family.
    """
    if not key.isidentifier() or key.startswith("__") or rules.is_placeholder(module):
        return False
    if key in _MODULE_INTERNAL or key in _MODULE_CLASS or rules.is_scratch(module, key):
        return False
    held = (vars(module), module._parameters, module._buffers, module._modules)
    if any(key in each for each in held):
        return False
    on_class = inspect.getattr_static(type(module), key, None)
    return value_codec.is_plain(on_class) and may_become(value_codec.from_plain(on_class), value)


def may_become(held: Plain, value: Plain) -> bool:
    """Whether loading may have put ``value`` in the place of ``held``: of one family, or None on either side."""
    families = {value_codec.family(held), value_codec.family(value)}
    return len(families - {"none"}) < 2


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@dataclass(frozen=True)
class _Place:
    """Something that was met and not looked into yet."""

    value: Any
    name: str
    below: _Below


class _Walker:
    def __init__(self, model: nn.Module, rules: ModelRules) -> None:
        self._model = model
        self._rules = rules
        self._of_model = {id(module) for module in model.modules()}
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # ids are only unique among living objects
        self._queue: deque[_Place] = deque()
        #: Settings and what hangs on tensors come last: what can be reached otherwise is looked at with all its values.
        self._later: deque[_Place] = deque()

    def leaves(self) -> Iterator[Leaf]:
        yield from self._modules(self._model, "", _Below.MODULE)
        while self._queue:
            yield from self._open(self._queue.popleft())
        while self._later:
            place = self._later.popleft()
            if isinstance(place.value, torch.Tensor):
                yield from self._attributes(place)
            elif self._first_visit(place.value, place.name):
                yield from self._open(place)

    def _first_visit(self, thing: Any, name: str) -> bool:
        if id(thing) in self._seen:
            return False
        if len(self._alive) >= MAX_OBJECTS:
            raise ForkError(f"more than {MAX_OBJECTS} objects are reachable from the model, by way of {name}")
        self._seen.add(id(thing))
        self._alive.append(thing)
        return True

    def _modules(self, root: nn.Module, prefix: str, below: _Below) -> Iterator[Leaf]:
        for name, module in root.named_modules(prefix=prefix):
            # A hidden module may hold registered ones, which came first, and was visited itself when it was met.
            if self._first_visit(module, name) or module is root:
                yield from self._module(module, name, below)

    def _module(self, module: nn.Module, name: str, below: _Below) -> Iterator[Leaf]:
        if self._rules.is_placeholder(module):
            return
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and not self._rules.is_scratch(module, key):
                    yield from self._tensor(tensor, _join(name, key), module, key, below)
        for key in sorted(set(vars(module)) - _MODULE_INTERNAL):
            if not self._rules.is_scratch(module, key):
                yield from self._meet(vars(module)[key], _join(name, key), module, key, below)
        for hooks in _HOOKS:
            for number, hook in enumerate(vars(module)[hooks].values()):
                yield from self._meet(hook, _join(name, f"<{hooks.strip('_')} {number}>"), (), number, below)

    def _tensor(self, tensor: torch.Tensor, name: str, owner: Any, key: Any, below: _Below) -> Iterator[Leaf]:
        known = id(tensor) in self._seen
        if known and below is _Below.TENSOR:
            return  # loaders' closures lead back to the parameters that they hang on
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            for part in inner:
                yield from self._tensor(getattr(tensor, part), f"{name}.{part}", tensor, part, below)
        else:
            yield Leaf(name, owner, key, tensor)
        if self._first_visit(tensor, name) and getattr(tensor, "__dict__", None):
            self._later.append(_Place(tensor, name, _Below.TENSOR))

    def _meet(self, value: Any, name: str, owner: Any, key: Any, below: _Below) -> Iterator[Leaf]:  # noqa: PLR0912
        """The leaf that ``value`` is, or none: then it is looked into in its turn."""
        if len(name) > MAX_NAME:
            raise ForkError(f"the model nests deeper than can be named: {name[:200]}...")
        if type(value) in weakref.ProxyTypes:
            try:
                value = value.__repr__.__self__
            except ReferenceError:  # what it stood for is gone
                return
        if isinstance(value, torch.Tensor):
            yield from self._tensor(value, name, owner, key, below)
        elif value_codec.is_plain(value):
            if below is _Below.MODULE or (below is _Below.TENSOR and type(value) is float):
                yield Leaf(name, owner, key, value_codec.from_plain(value))
        elif isinstance(value, enum.Enum):
            if below is _Below.MODULE:
                # Compared and never set: a member belongs to the whole process, and text is not one.
                yield Leaf(f"{name}.<member>", (), "member", f"{type(value).__qualname__}.{value.name}")
        elif value_codec.is_data(value):
            if below is _Below.MODULE or value_codec.is_array(value):
                yield self._data(value, name, owner, key)
        elif isinstance(value, (int, float, str)):
            if below is _Below.MODULE:  # of a subclass, which a value from elsewhere is not
                yield Leaf(f"{name}.<value>", (), "value", f"{type(value).__qualname__} {value}")
        elif isinstance(value, (torch.ScriptObject, torch.UntypedStorage, torch.TypedStorage)):
            yield Leaf(name, owner, key, Opaque(type(value).__name__))
        elif keeps_own_results(value):
            yield Leaf(name, owner, key, Opaque("results that functools.lru_cache keeps"))
        elif not isinstance(value, (type, types.ModuleType)):
            self._put_off(value, name, below)

    @staticmethod
    def _data(value: Any, name: str, owner: Any, key: Any) -> Leaf:
        try:
            data = value_codec.as_data(value)
        except ForkError as error:
            raise ForkError(f"{name} is {error}") from error
        # What cannot be passed on is compared and never set.
        return Leaf(name, owner, key, data) if isinstance(data, dict) else Leaf(f"{name}.<digest>", (), key, data)

    def _put_off(self, value: Any, name: str, below: _Below) -> None:
        if isinstance(value, nn.Module):
            # One that the model does not register is kept in a list, for instance, so as to stay out of state_dict.
            if id(value) in self._of_model:
                return
        elif value is os.environ or self._rules.is_scratch_object(value):
            return
        if below is _Below.MODULE and type(value).__name__.endswith("Config") and not self._rules.is_foreign(value):
            below = _Below.CONFIG
        place = _Place(value, name, below)
        if below is not _Below.MODULE:
            self._later.append(place)
        elif self._first_visit(value, name):
            self._queue.append(place)

    def _open(self, place: _Place) -> Iterator[Leaf]:
        value, name, below = place.value, place.name, place.below
        if isinstance(value, nn.Module):
            yield from self._modules(value, name, below)
        elif isinstance(value, Mapping):
            yield from self._mapping(value, name, below)
        elif isinstance(value, (list, tuple, deque, UserList)):
            for number, inner in enumerate(value):
                yield from self._meet(inner, f"{name}[{number}]", value, number, below)
        elif isinstance(value, (ValuesView, ItemsView)) or value_codec.is_array(value):  # an array of objects
            for number, inner in enumerate(value.flat if value_codec.is_array(value) else value):
                yield from self._meet(inner, f"{name}[{number}]", (), number, below)
        elif isinstance(value, Set):
            yield from self._set(value, name, below)
        if isinstance(value, (Mapping, list, tuple, deque, UserList, Set)):
            if not self._rules.is_foreign(value) and getattr(value, "__dict__", None):
                yield from self._attributes(place)
        elif not (isinstance(value, (nn.Module, ValuesView, ItemsView)) or value_codec.is_array(value)):
            if isinstance(value, _NAMESPACES) or not self._rules.is_foreign(value):
                yield from self._attributes(place)
            for label, inner, owner in opened(value):
                yield from self._meet(inner, f"{name}.<{label}>", owner, label, below)

    def _mapping(self, value: Mapping[Any, Any], name: str, below: _Below) -> Iterator[Leaf]:
        labels: set[str] = set()
        for number, (key, inner) in enumerate(value.items()):
            label = _label(key) or f"#{number}"
            if label in labels:  # 1 and "1"
                label = f"#{number}"
            labels.add(label)
            if not (isinstance(key, str) and key in self._rules.scratch_buffers):
                yield from self._meet(inner, f"{name}[{label}]", value, key, below)
            if not value_codec.is_plain(key):
                yield from self._meet(key, f"{name}.<key {number}>", (), number, _Below.CONFIG)

    def _set(self, value: Set[Any], name: str, below: _Below) -> Iterator[Leaf]:
        """Sets of other than plain values have no order that two processes share."""
        members = [member for member in value if self._may_hold(member)]
        if len(members) > 1:
            yield Leaf(name, (), "", Opaque(f"a set of {len(members)} objects, which have no order"))
        else:
            for member in members:
                yield from self._meet(member, f"{name}.<member>", (), 0, below)

    def _may_hold(self, value: Any) -> bool:
        if isinstance(value, nn.Module):
            return id(value) not in self._of_model
        if value_codec.is_plain(value) or isinstance(value, (enum.Enum, type, types.ModuleType, str, int, float)):
            return False
        if isinstance(value, (tuple, frozenset)):
            return any(map(self._may_hold, value))
        if isinstance(value, (torch.Tensor, Mapping, list, *_NAMESPACES)) or not self._rules.is_foreign(value):
            return True
        parts = opened(value)
        if isinstance(value, types.FunctionType):  # may lead back to itself
            return any(True for _ in parts)
        return any(self._may_hold(inner) for _, inner, _ in parts)

    def _attributes(self, place: _Place) -> Iterator[Leaf]:
        """What hangs on a helper or a tensor."""
        value, name, below = place.value, place.name, place.below
        attributes = dict(getattr(value, "__dict__", {}))
        for kind in () if isinstance(value, torch.Tensor) else type(value).__mro__:
            # By their descriptors: names of private slots are mangled, and ``__slots__`` may be used up.
            for slot, member in vars(kind).items() if "__slots__" in vars(kind) else ():
                if isinstance(member, types.MemberDescriptorType) and slot not in attributes:
                    with contextlib.suppress(AttributeError):  # one that was never filled
                        attributes[slot] = member.__get__(value)
        if not attributes and _is_native(value) and below is _Below.MODULE:
            # What it holds cannot be seen; that it is there can.
            yield Leaf(f"{name}.<native>", (), "native", f"{type(value).__module__}.{type(value).__qualname__}")
        for key in sorted(attributes, key=str):
            if key == "data" and isinstance(value, (UserList, UserDict)):
                continue  # its items, which have been met
            if not self._rules.is_scratch(value, key):
                yield from self._meet(attributes[key], f"{name}.{key}", value, key, below)


def _label(key: Any) -> str:
    """What a key is called wherever it stands in its mapping; empty where that cannot be told."""
    if isinstance(key, enum.Enum):
        return f"{type(key).__qualname__}.{key.name}"
    if isinstance(key, (str, int)):
        return str(key)
    if isinstance(key, torch.dtype):
        return str(key)
    if isinstance(key, tuple) and all(isinstance(part, (str, int, torch.dtype, type(None))) for part in key):
        return f"({', '.join(map(str, key))})"
    return ""


def _is_native(value: Any) -> bool:
    return not hasattr(value, "__dict__") and any("__slots__" not in vars(kind) for kind in type(value).__mro__[:-1])
