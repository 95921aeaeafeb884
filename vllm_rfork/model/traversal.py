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
from vllm_rfork.model.closures import keeps_own_results, referents
from vllm_rfork.model.rules import ModelRules

#: More leaves and objects than any model has: a traversal that leaves the model would otherwise not end.
MAX_LEAVES = 5_000_000
MAX_OBJECTS = 2_000_000
#: Maximum length of a name in characters, about 150 steps. The longest seen in a model has 150 characters.
MAX_NAME = 1_000

#: nn.Module's own attributes. Only its hooks can refer to anything.
MODULE_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")

_NAMESPACES = (types.SimpleNamespace, argparse.Namespace, threading.local)


class _Scope(enum.Enum):
    """Which plain values scope a place count. Tensors and arrays count in every scope."""

    #: All of them.
    MODULE = enum.auto()
    #: None: they are settings, which the fingerprint covers. A quantization's configuration may refer to scales.
    CONFIG = enum.auto()
    #: Floats, which are scales of some quantization methods. The other attributes of a tensor are for loaders.
    TENSOR = enum.auto()


@dataclass(frozen=True)
class Opaque:
    """An object whose memory cannot be seen; packed weights may lie in it."""

    kind: str


@dataclass(frozen=True)
class Leaf:
    """One value of a model.

    Attributes:
        name: its path from the model, unique in one traversal.
        owner, key: ``owner[key]`` or ``owner.key`` refers to it; ``()`` is the owner of what cannot be set.
        value: a tensor, :class:`Opaque`, or a plain value as :mod:`~vllm_rfork.model.value_codec` encodes it.
    """

    name: str
    owner: Any
    key: Any
    value: Any


def walk(model: nn.Module, rules: ModelRules) -> Iterator[Leaf]:
    """Every tensor and plain value reachable from ``model``, except what ``rules`` skip.

    An aliased tensor is yielded under each of its names; a helper object or hidden module only under its shortest one.

    Raises:
        ForkError: the traversal has left the model (``MAX_LEAVES``, ``MAX_OBJECTS``, ``MAX_NAME``), an array is too
            large to be compared, or an object of the model raised when it was read.
    """
    leaves = _Traversal(model, rules).leaves()
    names: set[str] = set()
    while True:
        try:
            leaf = next(leaves)
        except StopIteration:
            return
        except ForkError:
            raise
        except Exception as error:
            # Mappings, slots and wrapper tensors run their own code, whose errors must not fail a load from storage.
            raise ForkError(f"the model's attributes cannot be read: {type(error).__name__}: {error}") from error
        if len(names) >= MAX_LEAVES:
            raise ForkError(f"more than {MAX_LEAVES} tensors and values are reachable from the model")
        name = leaf.name
        while name in names:  # for instance a method's <self> and a variable of that name in its closure
            name += "'"
        names.add(name)
        yield leaf if name == leaf.name else dataclasses.replace(leaf, name=name)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


@dataclass(frozen=True)
class _Place:
    """An object whose contents have not been visited yet."""

    value: Any
    name: str
    scope: _Scope


class _Traversal:
    def __init__(self, model: nn.Module, rules: ModelRules) -> None:
        self._model = model
        self._rules = rules
        self._of_model = {id(module) for module in model.modules()}
        self._seen: set[int] = set()
        self._alive: list[Any] = []  # an id is unique only while its object lives
        self._queue: deque[_Place] = deque()
        # Settings and attributes of tensors come last, so that an object that is also reachable in another way is
        # visited there, in the scope in which all its values count.
        self._later: deque[_Place] = deque()

    def leaves(self) -> Iterator[Leaf]:
        yield from self._modules(self._model, "", _Scope.MODULE)
        while self._queue:
            yield from self._contents(self._queue.popleft())
        while self._later:
            place = self._later.popleft()
            if isinstance(place.value, torch.Tensor):
                yield from self._attributes(place)
            elif self._first_visit(place.value, place.name):
                yield from self._contents(place)

    def _first_visit(self, thing: Any, name: str) -> bool:
        if id(thing) in self._seen:
            return False
        if len(self._alive) >= MAX_OBJECTS:
            raise ForkError(f"more than {MAX_OBJECTS} objects are reachable from the model, by way of {name}")
        self._seen.add(id(thing))
        self._alive.append(thing)
        return True

    def _modules(self, root: nn.Module, prefix: str, scope: _Scope) -> Iterator[Leaf]:
        for name, module in root.named_modules(prefix=prefix):
            # Modules inside a hidden one may be registered, too, and were visited first.
            if self._first_visit(module, name) or module is root:
                yield from self._module(module, name, scope)

    def _module(self, module: nn.Module, name: str, scope: _Scope) -> Iterator[Leaf]:
        if self._rules.is_placeholder(module):
            return
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and not self._rules.is_scratch(module, key):
                    yield from self._tensor(tensor, _join(name, key), module, key, scope)
        for key in sorted(set(vars(module)) - MODULE_INTERNAL):
            if not self._rules.is_scratch(module, key):
                yield from self._visit(vars(module)[key], _join(name, key), module, key, scope)
        for hooks in _HOOKS:
            for number, hook in enumerate(vars(module)[hooks].values()):
                yield from self._visit(hook, _join(name, f"<{hooks.strip('_')} {number}>"), (), number, scope)

    def _tensor(self, tensor: torch.Tensor, name: str, owner: Any, key: Any, scope: _Scope) -> Iterator[Leaf]:
        known = id(tensor) in self._seen
        if known and scope is _Scope.TENSOR:
            return  # a loader's closure leads back to the parameter that it is an attribute of
        if is_traceable_wrapper_subclass(tensor):
            inner, _ = tensor.__tensor_flatten__()
            for part in inner:
                yield from self._tensor(getattr(tensor, part), f"{name}.{part}", tensor, part, scope)
        else:
            yield Leaf(name, owner, key, tensor)
        if self._first_visit(tensor, name) and getattr(tensor, "__dict__", None):
            self._later.append(_Place(tensor, name, _Scope.TENSOR))

    def _visit(self, value: Any, name: str, owner: Any, key: Any, scope: _Scope) -> Iterator[Leaf]:  # noqa: PLR0912
        """Yield ``value`` if it is a leaf; otherwise queue it."""
        if len(name) > MAX_NAME:
            raise ForkError(f"the model nests deeper than can be named: {name[:200]}...")
        if type(value) in weakref.ProxyTypes:
            try:
                value = value.__repr__.__self__
            except ReferenceError:  # its referent is gone
                return
        if isinstance(value, torch.Tensor):
            yield from self._tensor(value, name, owner, key, scope)
        elif value_codec.is_plain(value):
            if scope is _Scope.MODULE or (scope is _Scope.TENSOR and type(value) is float):
                yield Leaf(name, owner, key, value_codec.encode_plain(value))
        elif isinstance(value, enum.Enum):
            if scope is _Scope.MODULE:
                # Compared, never set: a member belongs to the process, and its name is not the member.
                yield Leaf(f"{name}.<member>", (), "member", f"{type(value).__qualname__}.{value.name}")
        elif value_codec.is_encodable(value):
            if scope is _Scope.MODULE or value_codec.is_array(value):
                yield self._data(value, name, owner, key)
        elif isinstance(value, (int, float, str)):
            if scope is _Scope.MODULE:  # of a subclass, which no value of a seed can be
                yield Leaf(f"{name}.<value>", (), "value", f"{type(value).__qualname__} {value}")
        elif isinstance(value, (torch.ScriptObject, torch.UntypedStorage, torch.TypedStorage)):
            yield Leaf(name, owner, key, Opaque(type(value).__name__))
        elif keeps_own_results(value):
            yield Leaf(name, owner, key, Opaque("results cached by functools.lru_cache"))
        elif not isinstance(value, (type, types.ModuleType)):
            self._enqueue(value, name, scope)

    @staticmethod
    def _data(value: Any, name: str, owner: Any, key: Any) -> Leaf:
        try:
            data = value_codec.encode(value)
        except ForkError as error:
            raise ForkError(f"{name} is {error}") from error
        # A digest is compared, never set.
        return Leaf(name, owner, key, data) if isinstance(data, dict) else Leaf(f"{name}.<digest>", (), key, data)

    def _enqueue(self, value: Any, name: str, scope: _Scope) -> None:
        if isinstance(value, nn.Module):
            # Modules in a list, for instance, are not registered, so as to stay out of state_dict.
            if id(value) in self._of_model:
                return
        elif value is os.environ or self._rules.is_scratch_object(value):
            return
        if scope is _Scope.MODULE and type(value).__name__.endswith("Config") and not self._rules.is_foreign(value):
            scope = _Scope.CONFIG
        place = _Place(value, name, scope)
        if scope is not _Scope.MODULE:
            self._later.append(place)
        elif self._first_visit(value, name):
            self._queue.append(place)

    def _contents(self, place: _Place) -> Iterator[Leaf]:
        value, name, scope = place.value, place.name, place.scope
        if isinstance(value, nn.Module):
            yield from self._modules(value, name, scope)
        elif isinstance(value, Mapping):
            yield from self._mapping(value, name, scope)
        elif isinstance(value, (list, tuple, deque, UserList)):
            for number, inner in enumerate(value):
                yield from self._visit(inner, f"{name}[{number}]", value, number, scope)
        elif isinstance(value, (ValuesView, ItemsView)) or value_codec.is_array(value):  # an array of objects
            for number, inner in enumerate(value.flat if value_codec.is_array(value) else value):
                yield from self._visit(inner, f"{name}[{number}]", (), number, scope)
        elif isinstance(value, Set):
            yield from self._set(value, name, scope)
        if isinstance(value, (Mapping, list, tuple, deque, UserList, Set)):
            if not self._rules.is_foreign(value) and getattr(value, "__dict__", None):
                yield from self._attributes(place)
        elif not (isinstance(value, (nn.Module, ValuesView, ItemsView)) or value_codec.is_array(value)):
            if isinstance(value, _NAMESPACES) or not self._rules.is_foreign(value):
                yield from self._attributes(place)
            for label, inner, owner in referents(value):
                yield from self._visit(inner, f"{name}.<{label}>", owner, label, scope)

    def _mapping(self, value: Mapping[Any, Any], name: str, scope: _Scope) -> Iterator[Leaf]:
        labels: set[str] = set()
        for number, (key, inner) in enumerate(value.items()):
            label = _label(key)
            if not label or label in labels:  # 1 and "1"
                label = f"#{number}"
            labels.add(label)
            if not (isinstance(key, str) and key in self._rules.scratch_buffers):
                yield from self._visit(inner, f"{name}[{label}]", value, key, scope)
            if not value_codec.is_plain(key):
                yield from self._visit(key, f"{name}.<key {number}>", (), number, _Scope.CONFIG)

    def _set(self, value: Set[Any], name: str, scope: _Scope) -> Iterator[Leaf]:
        """The order of a set of objects differs between processes, so at most one of them may contain anything."""
        members = [member for member in value if self._may_contain(member)]
        if len(members) > 1:
            yield Leaf(name, (), "", Opaque(f"a set of {len(members)} objects, which have no order"))
        else:
            for member in members:
                yield from self._visit(member, f"{name}.<member>", (), 0, scope)

    def _may_contain(self, value: Any) -> bool:
        if isinstance(value, nn.Module):
            return id(value) not in self._of_model
        if value_codec.is_plain(value) or isinstance(value, (enum.Enum, type, types.ModuleType, str, int, float)):
            return False
        if isinstance(value, (tuple, frozenset)):
            return any(map(self._may_contain, value))
        if isinstance(value, (torch.Tensor, Mapping, list, *_NAMESPACES)) or not self._rules.is_foreign(value):
            return True
        parts = referents(value)
        if isinstance(value, types.FunctionType):  # it may refer to itself
            return any(True for _ in parts)
        return any(self._may_contain(inner) for _, inner, _ in parts)

    def _attributes(self, place: _Place) -> Iterator[Leaf]:
        """The attributes of a helper or a tensor."""
        value, name, scope = place.value, place.name, place.scope
        attributes = dict(getattr(value, "__dict__", {}))
        for kind in () if isinstance(value, torch.Tensor) else type(value).__mro__:
            # Through descriptors: names of private slots are mangled, and ``__slots__`` may be an exhausted iterator.
            for slot, member in vars(kind).items() if "__slots__" in vars(kind) else ():
                if isinstance(member, types.MemberDescriptorType) and slot not in attributes:
                    with contextlib.suppress(AttributeError):  # an unset slot
                        attributes[slot] = member.__get__(value)
        if not attributes and _is_native(value) and scope is _Scope.MODULE:
            # Its contents cannot be seen, only that it exists.
            yield Leaf(f"{name}.<native>", (), "native", f"{type(value).__module__}.{type(value).__qualname__}")
        for key in sorted(attributes, key=str):
            if key == "data" and isinstance(value, (UserList, UserDict)):
                continue  # its items, which have been visited
            if not self._rules.is_scratch(value, key):
                yield from self._visit(attributes[key], f"{name}.{key}", value, key, scope)


def _label(key: Any) -> str | None:
    """A name for ``key`` that does not depend on its place in the mapping, if it has one."""
    if isinstance(key, enum.Enum):
        return f"{type(key).__qualname__}.{key.name}"
    if isinstance(key, (str, int, torch.dtype)):
        return str(key)
    if isinstance(key, tuple) and all(isinstance(part, (str, int, torch.dtype, type(None))) for part in key):
        return f"({', '.join(map(str, key))})"
    return None


def _is_native(value: Any) -> bool:
    return not hasattr(value, "__dict__") and any("__slots__" not in vars(kind) for kind in type(value).__mro__[:-1])
