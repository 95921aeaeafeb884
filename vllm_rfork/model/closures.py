"""The referents of functions, methods, references and iterators: closures, defaults and bound arguments have tensors.

One step deep; :mod:`~vllm_rfork.model.traversal` continues from there. No object is called.
"""

from __future__ import annotations

import functools
import gc
import types
import weakref
from collections.abc import Iterator
from typing import Any

from vllm_rfork.model import value_codec

_BUILTIN_METHODS = (types.BuiltinMethodType, types.MethodWrapperType)
_LRU_CACHE = type(functools.lru_cache(lambda: None))


def keeps_own_results(cached: Any) -> bool:
    """True if ``cached`` is a function of this model with cached results; module-level functions are the process's."""
    return (
        isinstance(cached, _LRU_CACHE)
        and "<locals>" in getattr(cached, "__qualname__", "<locals>")
        and bool(cached.cache_info().currsize)
    )


#: Label, object, and the object's owner as in :class:`~vllm_rfork.model.traversal.Leaf`.
Referents = Iterator[tuple[str, Any, Any]]


def referents(value: Any) -> Referents:  # noqa: PLR0912 - one branch per kind
    """The objects that ``value`` refers to; none if it is not a function, method, reference or iterator."""
    if isinstance(value, types.FunctionType):
        yield from _function(value)
    elif isinstance(value, functools.partial):
        yield from (("func", value.func, ()), ("args", value.args, ()), ("keywords", value.keywords, ()))
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__, ()
        if isinstance(value.__func__, types.FunctionType):
            yield from _function(value.__func__)
        else:
            yield "func", value.__func__, ()
    elif isinstance(value, _BUILTIN_METHODS):
        yield "self", getattr(value, "__self__", None), ()
    elif isinstance(value, _LRU_CACHE):
        yield "wrapped", getattr(value, "__wrapped__", None), ()
    elif isinstance(value, weakref.ref):
        if (referent := value()) is not None:
            yield "ref", referent, ()
    elif isinstance(value, memoryview):
        yield "memory", value.obj, ()
    elif isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
        # Through the garbage collector, without advancing it.
        for number, inner in enumerate(gc.get_referents(value)):
            if not (value_codec.is_plain(inner) or isinstance(inner, (types.FrameType, types.CodeType))):
                yield f"held {number}", inner, ()


def _function(function: types.FunctionType) -> Referents:
    """The variables of its closure; defaults and attributes unless they are plain values."""
    for label, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            inner = cell.cell_contents
        except ValueError:  # the variable is not bound yet
            continue
        yield label, inner, cell
    others = [(f"default {number}", inner) for number, inner in enumerate(function.__defaults__ or ())]
    others += [(f"default {key}", inner) for key, inner in (function.__kwdefaults__ or {}).items()]
    others += [(f"attribute {key}", inner) for key, inner in sorted(vars(function).items())]
    for label, inner in others:
        if not value_codec.is_plain(inner):
            yield label, inner, ()
