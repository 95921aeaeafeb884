"""Values of a model's Python side that JSON does not know, as plain data and back: arrays of numpy, sets, bytes.

Small ones can be passed on. Of larger ones there is a text that tells two of them apart, so that a difference is an
error; still larger ones are refused. Looks at values that are given and at nothing behind them. numpy is not imported:
where the process has none, there is no array of it.

What comes from a seed is taken only in the form in which :func:`as_data` writes it, and within its bounds: a seed that
sends anything else may mean harm (a set of numbers with one hash, for instance, takes quadratic time to build).
"""

from __future__ import annotations

import array
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Set
from typing import Any

from vllm_rfork.errors import ForkError

#: What travels: plain values as they are, everything else as a mapping whose first key is one of ``_MAKERS``.
Plain = bool | int | float | str | None | dict[str, Any]

#: What is passed on has at most this many bytes (a set: elements times 8): tables of scales and indices are smaller.
MAX_PASSED_NBYTES = 64 * 1024
#: What is compared has at most this many; arrays that are mapped from a file of weights are larger.
MAX_COMPARED_NBYTES = 64 * 1024 * 1024

#: Hexadecimal digits of an integer that JSON does not hold.
MAX_INT_DIGITS = 4096
#: Members of one set with the same hash: two by chance (-1 and -2), more by intent.
MAX_SAME_HASH = 16

#: numpy's kinds that are numbers: no objects, no texts, no structures.
_NUMBERS = "?biufc"
#: As numpy names a type of numbers in ``dtype.str``.
_DTYPE = re.compile(r"[<>|][biufc][0-9]{1,2}")
_TYPECODES = frozenset("bBhHiIlLqQfd")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_INT = re.compile(rf"-?0x[0-9a-f]{{1,{MAX_INT_DIGITS}}}")
_FLOATS = frozenset({"nan", "inf", "-inf"})
_HEX_FLOAT = re.compile(r"-?0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}|nan|-?inf")
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
        ForkError: it stands for none, or is not written as :func:`as_data` writes it.
    """
    if is_plain(data):
        return data
    try:
        kind = _kind(data)
        return _MAKERS[kind](data)
    except Exception as error:
        raise ForkError(f"{_beginning(data)} is no plain value") from error


def family(data: Any) -> str:
    """The family of the value that ``data`` stands for: values of one family may take each other's places."""
    if data is None:
        return "none"
    if type(data) is str:
        return "text"
    return "number" if is_plain(data) else _FAMILIES.get(_kind(data), "unknown")


def _kind(data: Any) -> str:
    """The key that says of which type the value is; the first, and the others are that type's."""
    kind = next(iter(data)) if type(data) is dict and data else None
    if not isinstance(kind, str) or data.keys() != _FIELDS.get(kind):
        raise TypeError("not of the form that values have")
    return kind


def _beginning(data: Any) -> str:
    """The beginning of ``data`` as text, without making a text of all of it."""
    if type(data) is dict:
        return f"a mapping of {len(data)} keys, the first {str(next(iter(data), None))[:40]!r},"
    return f"a list of {len(data)}" if type(data) is list else f"a {type(data).__name__}"


def _bytes(data: dict[str, Any]) -> bytes:
    text = data["hex"]
    if len(text) > 2 * MAX_PASSED_NBYTES or not _HEX.fullmatch(text):
        raise ValueError("not the bytes of a value")
    return bytes.fromhex(text)


def _float(data: dict[str, Any]) -> float:
    if data["float"] not in _FLOATS:
        raise ValueError("a number that JSON holds")
    return float(data["float"])


def _int(data: dict[str, Any]) -> int:
    if not _INT.fullmatch(data["int"]) or from_plain(value := int(data["int"], 16)) != data:
        raise ValueError("no integer, or one that JSON holds")
    return value


def _complex(data: dict[str, Any]) -> complex:
    real, imag = data["complex"]
    if not (_HEX_FLOAT.fullmatch(real) and _HEX_FLOAT.fullmatch(imag)):
        raise ValueError("no complex number")
    return complex(float.fromhex(real), float.fromhex(imag))


def _members(members: Any) -> list[Any]:
    """The members of a set, none of them yet in one."""
    if type(members) is not list or len(members) * 8 > MAX_PASSED_NBYTES:
        raise TypeError("not the members of a set, or too many")
    made = [member if is_plain(member) else _NUMBER_MAKERS[_kind(member)](member) for member in members]
    # Hashes are numbers that differ: unlike the members, they cannot be chosen so that counting them takes long.
    if made and max(Counter(map(hash, made)).values()) > MAX_SAME_HASH:
        raise ValueError("too many members with the same hash")
    return made


def _array(data: dict[str, Any]) -> array.array[Any]:
    if data["array"] not in _TYPECODES:
        raise ValueError("no type of numbers")
    return array.array(data["array"], _bytes(data))


def _numpy(data: dict[str, Any]) -> Any:
    numpy = sys.modules["numpy"]
    shape, scalar = data["shape"], data["scalar"]
    if not _DTYPE.fullmatch(data["numpy"]):
        raise TypeError("no numbers")
    if type(shape) is not list or len(shape) > 64 or any(type(size) is not int or size < 0 for size in shape):
        raise TypeError("no shape")
    if type(scalar) is not bool or (scalar and shape):
        raise TypeError("neither an array nor a scalar")
    kind = numpy.dtype(data["numpy"])
    values = numpy.frombuffer(_bytes(data), kind).reshape(shape)
    return values[()] if scalar else values.copy()


#: By the first key.
_NUMBER_MAKERS: dict[str, Any] = {"float": _float, "int": _int}
_MAKERS: dict[str, Any] = {
    **_NUMBER_MAKERS,
    "complex": _complex,
    "set": lambda data: set(_members(data["set"])),
    "frozenset": lambda data: frozenset(_members(data["frozenset"])),
    "bytes": _bytes,
    "bytearray": lambda data: bytearray(_bytes(data)),
    "array": _array,
    "numpy": _numpy,
}
#: All keys of each kind's mapping.
_FIELDS: dict[str, set[str]] = {
    kind: {kind, *others.split()}
    for kind, others in {
        **dict.fromkeys(("float", "int", "complex", "set", "frozenset"), ""),
        **dict.fromkeys(("bytes", "bytearray", "array"), "hex"),
        "numpy": "shape scalar hex",
    }.items()
}
_FAMILIES = {
    **dict.fromkeys(("float", "int", "complex", "array", "numpy"), "number"),
    **dict.fromkeys(("set", "frozenset"), "set"),
    **dict.fromkeys(("bytes", "bytearray"), "bytes"),
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
