"""Canonical form of configuration objects: equal configurations give equal plain data in every process.

``repr`` is not used, because it may contain an address. Only attributes of data objects are read.
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

#: Of objects nested deeper than this only the class counts.
MAX_DEPTH = 12


def plain(value: Any, *, ignored: frozenset[str] = frozenset()) -> Any:
    """``value`` as nested dicts, lists, text, numbers, booleans and None.

    An object becomes the name of its class and its public attributes; enumerations, dtypes, classes, functions,
    patterns and paths become their names; sets are sorted. Keys in ``ignored`` are skipped, at any depth.
    """
    return _plain(value, ignored, ())


def _plain(value: Any, ignored: frozenset[str], above: tuple[int, ...]) -> Any:
    for kinds, name_of in _SIMPLE:
        if isinstance(value, kinds):
            return name_of(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return _class_name(value)
    if len(above) >= MAX_DEPTH or id(value) in above:
        return _class_name(type(value))
    return _nested(value, ignored, (*above, id(value)))


def _nested(value: Any, ignored: frozenset[str], above: tuple[int, ...]) -> Any:
    if isinstance(value, Mapping):
        items = ((_key(key), inner) for key, inner in value.items())
        return {key: _plain(inner, ignored, above) for key, inner in items if key not in ignored}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, ignored, above) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(inner, ignored, above) for inner in value), key=_text)
    if isinstance(value, _OPAQUE) or not hasattr(value, "__dict__"):
        return _class_name(type(value))
    public = {name: inner for name, inner in vars(value).items() if not name.startswith("_")}
    return {"class": _class_name(type(value)), "fields": _plain(public, ignored, above)}


def _key(key: Any) -> str:
    found = _plain(key, frozenset(), ())
    return found if isinstance(found, str) else _text(found)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _class_name(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


#: Types without contents; the first match counts, because an enumeration may be a number or text as well.
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
#: Only the class of these counts: their contents are not configuration.
_OPAQUE = (torch.Tensor, torch.nn.Module, logging.Logger)
