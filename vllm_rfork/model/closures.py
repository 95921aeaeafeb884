"""What functions, methods, references and iterators hold: tensors hide in closures, defaults and bound arguments.

Lists what is there, one step deep; :mod:`~vllm_rfork.model.traversal` goes on from it. Calls nothing it looks at.
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
    """Whether ``cached`` is a function made for this model that holds results; others are the process's."""
    return (
        isinstance(cached, _LRU_CACHE)
        and "<locals>" in getattr(cached, "__qualname__", "<locals>")
        and bool(cached.cache_info().currsize)
    )


#: Label, what was found under it, and its owner for :func:`assign`.
Parts = Iterator[tuple[str, Any, Any]]


def opened(value: Any) -> Parts:  # noqa: PLR0912 - one branch per kind
    """What functions and the like hold; nothing for what is left out by rule."""
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
        # Looked at without drawing from it.
        for number, inner in enumerate(gc.get_referents(value)):
            if not (value_codec.is_plain(inner) or isinstance(inner, (types.FrameType, types.CodeType))):
                yield f"held {number}", inner, ()


def _function(function: types.FunctionType) -> Parts:
    """What its closure holds; those of its defaults and attributes that are no plain values."""
    for label, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            inner = cell.cell_contents
        except ValueError:  # an empty cell: the variable is not bound yet
            continue
        yield label, inner, cell
    others = [(f"default {number}", inner) for number, inner in enumerate(function.__defaults__ or ())]
    others += [(f"default {key}", inner) for key, inner in (function.__kwdefaults__ or {}).items()]
    others += [(f"attribute {key}", inner) for key, inner in sorted(vars(function).items())]
    for label, inner in others:
        if not value_codec.is_plain(inner):
            yield label, inner, ()
