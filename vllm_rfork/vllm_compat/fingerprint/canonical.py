"""Configuration objects of any kind as plain data: equal configurations give equal data in every process.

No ``repr`` of an object is used: it may hold an address. Nothing is executed beyond attribute access on data objects.
"""

from __future__ import annotations

import enum
import json
import logging
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

#: Objects nested deeper than this are named, not looked into.
MAX_DEPTH = 12


def plain(value: Any, *, leave_out: frozenset[str] = frozenset()) -> Any:
    """``value`` as nested dicts, lists, text, numbers, booleans and None.

    Objects become their class's name and their public attributes; enumerations, dtypes, classes, functions, patterns
    and paths their names; sets are sorted. Mappings leave out the keys in ``leave_out``, at any depth.
    """
    return _plain(value, leave_out, ())


def _plain(value: Any, leave_out: frozenset[str], above: tuple[int, ...]) -> Any:
    for kinds, name_of in _SIMPLE:
        if isinstance(value, kinds):
            return name_of(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return _class_name(value)
    if len(above) >= MAX_DEPTH or id(value) in above:
        return _class_name(type(value))
    return _nested(value, leave_out, (*above, id(value)))


def _nested(value: Any, leave_out: frozenset[str], above: tuple[int, ...]) -> Any:
    if isinstance(value, Mapping):
        items = ((_key(key), inner) for key, inner in value.items())
        return {key: _plain(inner, leave_out, above) for key, inner in items if key not in leave_out}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, leave_out, above) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(inner, leave_out, above) for inner in value), key=_text)
    if isinstance(value, _OPAQUE) or not hasattr(value, "__dict__"):
        return _class_name(type(value))
    public = {name: inner for name, inner in vars(value).items() if not name.startswith("_")}
    return {"class": _class_name(type(value)), "fields": _plain(public, leave_out, above)}


def _key(key: Any) -> str:
    found = _plain(key, frozenset(), ())
    return found if isinstance(found, str) else _text(found)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _class_name(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


#: What needs no looking into. The first that fits: an enumeration may be a number or text as well.
_SIMPLE: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (enum.Enum, lambda value: f"{type(value).__name__}.{value.name}"),
    ((bool, int, str, type(None)), lambda value: value),
    # JSON has no NaN and no infinity.
    (float, lambda value: value if math.isfinite(value) else repr(value)),
    ((torch.dtype, torch.device, pathlib.PurePath), str),
    ((bytes, bytearray), lambda value: bytes(value).hex()),
    (re.Pattern, lambda value: value.pattern),
    (type, _class_name),
)
#: Named, never looked into: what they hold is not configuration.
_OPAQUE = (torch.Tensor, torch.nn.Module, logging.Logger)
