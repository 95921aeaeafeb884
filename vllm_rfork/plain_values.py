"""Values of a model's Python side that JSON does not know, as plain data and back: arrays of numpy, sets, bytes.

Small ones can be passed on. Of larger ones there is a text that tells two of them apart, so that a difference is an
error; still larger ones are refused. Looks at values that are given and at nothing behind them. numpy is not imported:
where the process has none, there is no array of it.
"""

from __future__ import annotations

import array
import hashlib
import math
import sys
from collections.abc import Iterator, Set
from typing import Any

from vllm_rfork.errors import ForkError

#: What travels: plain values as they are, everything else as a mapping whose first key is one of ``_MAKERS``.
Plain = bool | int | float | str | None | dict[str, Any]

#: What is passed on has at most this many bytes (a set: elements times 8): tables of scales and indices are smaller.
MAX_PASSED_NBYTES = 64 * 1024
#: What is compared has at most this many; arrays that are mapped from a file of weights are larger.
MAX_COMPARED_NBYTES = 64 * 1024 * 1024

#: numpy's kinds that are numbers: no objects, no texts, no structures.
_NUMBERS = "?biufc"
#: What JSON holds exactly.
_LARGEST_INT = 1 << 63


def is_plain(value: Any) -> bool:
    """Whether ``value`` is of one of the types that JSON has, and of no subclass."""
    return value is None or type(value) in (bool, int, float, str)


def from_plain(value: Any) -> Plain:
    """``value``, which is plain; what JSON has no number for as a mapping."""
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}
    if type(value) is int and not -_LARGEST_INT <= value < _LARGEST_INT:
        return {"int": hex(value)}
    return value  # type: ignore[no-any-return]


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array of numpy's."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def is_data(value: Any) -> bool:
    """Whether ``value`` is one that :func:`as_data` takes."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return not value.dtype.hasobject
    return isinstance(value, (bytes, bytearray, complex, array.array)) or (
        isinstance(value, Set) and all(map(_is_plain_all_through, value))
    )


def _is_plain_all_through(value: Any) -> bool:
    return all(map(_is_plain_all_through, value)) if type(value) is tuple else is_plain(value)


def as_data(value: Any) -> dict[str, Any] | str:
    """``value`` as plain data, equal for equal values in every process; a text that only tells what it is where it
    cannot be passed on.

    Raises:
        ForkError: it is too large even to be compared.
    """
    if isinstance(value, Set):
        members = sorted(value, key=lambda member: (type(member).__name__, repr(member)))
        kind = type(value).__name__
        if type(value) in (set, frozenset) and len(members) * 8 <= MAX_PASSED_NBYTES and all(map(is_plain, members)):
            return {kind: [from_plain(member) for member in members]}
        return f"{kind} of {len(members)}, {_digest(repr(members).encode())}"
    if type(value) is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        what = {"numpy": value.dtype.str, "shape": list(value.shape), "scalar": isinstance(value, numpy.generic)}
        exact = type(value) is numpy.ndarray or isinstance(value, numpy.generic)
        return _sized(what, value, value.nbytes, exact and value.dtype.kind in _NUMBERS)
    if isinstance(value, array.array):
        return _sized({"array": value.typecode}, value, len(value) * value.itemsize, type(value) is array.array)
    return _sized({type(value).__name__: ""}, value, len(value), type(value) in (bytes, bytearray))


def _sized(what: dict[str, Any], value: Any, nbytes: int, passes: bool) -> dict[str, Any] | str:
    if nbytes > MAX_COMPARED_NBYTES:
        raise ForkError(f"{type(value).__name__} of {nbytes} bytes, which is too large to be compared")
    raw = bytes(value) if isinstance(value, (bytes, bytearray)) else value.tobytes()
    if passes and nbytes <= MAX_PASSED_NBYTES:
        return {**what, "hex": raw.hex()}
    return f"{what} {_digest(raw)}"


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def from_data(data: Any) -> Any:
    """The value that ``data``, which came from elsewhere, stands for.

    Raises:
        ForkError: it stands for none.
    """
    if is_plain(data):
        return data
    try:
        kind = next(iter(data))
        return _MAKERS[kind](data)
    except Exception as error:
        raise ForkError(f"{str(data)[:100]} is no plain value") from error


def _numpy(data: dict[str, Any]) -> Any:
    numpy = sys.modules["numpy"]
    kind = numpy.dtype(data["numpy"])
    if kind.kind not in _NUMBERS:
        raise TypeError(f"{kind} are no numbers")
    values = numpy.frombuffer(bytes.fromhex(data["hex"]), kind).reshape(data["shape"])
    return values[()] if data["scalar"] else values.copy()


#: By the first key.
_MAKERS: dict[str, Any] = {
    "float": lambda data: float(data["float"]),
    "int": lambda data: int(data["int"], 16),
    "complex": lambda data: complex(*map(float.fromhex, data["complex"])),
    "set": lambda data: {from_data(member) for member in data["set"]},
    "frozenset": lambda data: frozenset(from_data(member) for member in data["frozenset"]),
    "bytes": lambda data: bytes.fromhex(data["hex"]),
    "bytearray": lambda data: bytearray.fromhex(data["hex"]),
    "array": lambda data: array.array(data["array"], bytes.fromhex(data["hex"])),
    "numpy": _numpy,
}


def put_into(held: Any, value: Any) -> bool:
    """Give ``held`` the content of ``value`` where it stands, so that everyone who has it sees it; whether it could."""
    if type(held) is not type(value):
        return False
    if type(held) is set:
        held.clear()
        held.update(value)
        return True
    if isinstance(held, (bytearray, array.array)) and len(held) == len(value):
        held[:] = value
        return True
    if is_array(held) and held.dtype == value.dtype and held.shape == value.shape and held.flags.writeable:
        held[...] = value
        return True
    return False


def integers(data: Plain) -> Iterator[int]:
    """Numbers in ``data`` that are wide enough to be addresses."""
    if type(data) is int:
        yield data
    elif isinstance(data, dict):
        value = from_data(data)
        if isinstance(value, (set, frozenset)):
            yield from (member for member in value if type(member) is int)
        elif isinstance(value, array.array):
            yield from (member for member in value if isinstance(member, int))
        elif getattr(getattr(value, "dtype", None), "kind", "") in ("i", "u") and value.dtype.itemsize == 8:
            yield from (int(member) for member in value.reshape(-1))
