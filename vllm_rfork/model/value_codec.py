"""Codec for values of a model's Python side that JSON cannot represent: numpy arrays, sets, bytes and others.

Small values are encoded as plain data and can be set on a receiver. Larger ones are encoded as a text with a digest,
so that a difference is an error; still larger ones are refused. numpy is not imported: a process without it has none
of its arrays.

Data from a seed is decoded only if it has exactly the form that :func:`encode` produces, and within its bounds: other
data may be an attack (a set of numbers with one hash, for instance, takes quadratic time to build).
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

#: An encoded value: a plain value as it is, any other as a mapping whose first key is one of ``_DECODERS``.
Plain = bool | int | float | str | None | dict[str, Any]

#: Maximum size of a value that is passed on, in bytes (8 for each member of a set). Tables of scales are smaller.
MAX_PASSED_NBYTES = 64 * 1024
#: Maximum size of a value that is compared, in bytes. Arrays that are mapped from a file of weights are larger.
MAX_COMPARED_NBYTES = 64 * 1024 * 1024

#: Hexadecimal digits of an integer that JSON cannot represent.
MAX_INT_DIGITS = 4096
#: Members of one set with the same hash: two by chance (-1 and -2), more by intent.
MAX_SAME_HASH = 16

#: numpy's kinds of numbers: not objects, texts or structures.
_NUMBERS = "?biufc"
#: A type of numbers in numpy's ``dtype.str``.
_DTYPE = re.compile(r"[<>|][biufc][0-9]{1,2}")
_TYPECODES = frozenset("bBhHiIlLqQfd")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_INT = re.compile(rf"-?0x[0-9a-f]{{1,{MAX_INT_DIGITS}}}")
_FLOATS = frozenset({"nan", "inf", "-inf"})
_HEX_FLOAT = re.compile(r"-?0x[01]\.[0-9a-f]{1,13}p[+-][0-9]{1,4}|nan|-?inf")
#: JSON represents integers up to this size exactly.
_LARGEST_INT = 1 << 63


def is_plain(value: Any) -> bool:
    """True if ``value`` is of a type that JSON has, and not of a subclass."""
    return value is None or type(value) in (bool, int, float, str)


def encode_plain(value: Any) -> Plain:
    """Encode ``value``, which is plain; as a mapping if it is a number that JSON lacks."""
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}
    if type(value) is int and not -_LARGEST_INT <= value < _LARGEST_INT:
        return {"int": hex(value)}
    return value  # type: ignore[no-any-return]


def is_array(value: Any) -> bool:
    """True if ``value`` is a numpy array."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def is_encodable(value: Any) -> bool:
    """True if :func:`encode` accepts ``value``."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return not value.dtype.hasobject
    return isinstance(value, (bytes, bytearray, complex, array.array)) or (
        isinstance(value, Set) and all(map(_all_plain, value))
    )


def _all_plain(value: Any) -> bool:
    return all(map(_all_plain, value)) if type(value) is tuple else is_plain(value)


def encode(value: Any) -> dict[str, Any] | str:
    """``value`` as plain data, equal for equal values in every process; as a text with a digest if it is too large to
    be passed on, or of a type that cannot be set.

    Raises:
        ForkError: it is too large to be compared.
    """
    if isinstance(value, Set):
        members = sorted(value, key=lambda member: (type(member).__name__, repr(member)))
        kind = type(value).__name__
        if type(value) in (set, frozenset) and len(members) * 8 <= MAX_PASSED_NBYTES and all(map(is_plain, members)):
            return {kind: [encode_plain(member) for member in members]}
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


def decode(data: Any) -> Any:
    """The value that ``data``, which a seed sent, represents.

    Raises:
        ForkError: it does not have the form that :func:`encode` produces.
    """
    if is_plain(data):
        return data
    try:
        kind = _kind(data)
        return _DECODERS[kind](data)
    except Exception as error:
        raise ForkError(f"{_beginning(data)} is not an encoded value") from error


def family(data: Any) -> str:
    """The family of the value that ``data`` represents: values of one family may replace each other."""
    if data is None:
        return "none"
    if type(data) is str:
        return "text"
    return "number" if is_plain(data) else _FAMILIES.get(_kind(data), "unknown")


def _kind(data: Any) -> str:
    """The first key, which names the value's type; the other keys must be those of that type."""
    kind = next(iter(data)) if type(data) is dict and data else None
    if not isinstance(kind, str) or data.keys() != _FIELDS.get(kind):
        raise TypeError("not the form of an encoded value")
    return kind


def _beginning(data: Any) -> str:
    """A short description of ``data``, which may be large."""
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
        raise ValueError("a number that JSON represents")
    return float(data["float"])


def _int(data: dict[str, Any]) -> int:
    if not _INT.fullmatch(data["int"]) or encode_plain(value := int(data["int"], 16)) != data:
        raise ValueError("not an integer, or one that JSON represents")
    return value


def _complex(data: dict[str, Any]) -> complex:
    real, imag = data["complex"]
    if not (_HEX_FLOAT.fullmatch(real) and _HEX_FLOAT.fullmatch(imag)):
        raise ValueError("not a complex number")
    return complex(float.fromhex(real), float.fromhex(imag))


def _members(members: Any) -> list[Any]:
    """The members of a set, before any set is built of them."""
    if type(members) is not list or len(members) * 8 > MAX_PASSED_NBYTES:
        raise TypeError("not the members of a set, or too many")
    made = [member if is_plain(member) else _NUMBER_DECODERS[_kind(member)](member) for member in members]
    # Counting is fast whatever the seed sends: different hashes do not collide with each other.
    if made and max(Counter(map(hash, made)).values()) > MAX_SAME_HASH:
        raise ValueError("too many members with the same hash")
    return made


def _array(data: dict[str, Any]) -> array.array[Any]:
    if data["array"] not in _TYPECODES:
        raise ValueError("not a type of numbers")
    return array.array(data["array"], _bytes(data))


def _numpy(data: dict[str, Any]) -> Any:
    numpy = sys.modules["numpy"]
    shape, scalar = data["shape"], data["scalar"]
    if not _DTYPE.fullmatch(data["numpy"]):
        raise TypeError("not a type of numbers")
    if type(shape) is not list or len(shape) > 64 or any(type(size) is not int or size < 0 for size in shape):
        raise TypeError("not a shape")
    if type(scalar) is not bool or (scalar and shape):
        raise TypeError("neither an array nor a scalar")
    kind = numpy.dtype(data["numpy"])
    values = numpy.frombuffer(_bytes(data), kind).reshape(shape)
    return values[()] if scalar else values.copy()


#: By first key.
_NUMBER_DECODERS: dict[str, Any] = {"float": _float, "int": _int}
_DECODERS: dict[str, Any] = {
    **_NUMBER_DECODERS,
    "complex": _complex,
    "set": lambda data: set(_members(data["set"])),
    "frozenset": lambda data: frozenset(_members(data["frozenset"])),
    "bytes": _bytes,
    "bytearray": lambda data: bytearray(_bytes(data)),
    "array": _array,
    "numpy": _numpy,
}
#: First key → all keys.
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


def assign_in_place(held: Any, value: Any) -> bool:
    """Copy the content of ``value`` into ``held``, for all that refer to it; False if ``held`` cannot take it."""
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


def wide_integers(data: Plain) -> Iterator[int]:
    """The integers in ``data`` that are wide enough to be addresses."""
    if type(data) is int:
        yield data
    elif isinstance(data, dict):
        value = decode(data)
        if isinstance(value, (set, frozenset)):
            yield from (member for member in value if type(member) is int)
        elif isinstance(value, array.array):
            yield from (member for member in value if isinstance(member, int))
        elif getattr(getattr(value, "dtype", None), "kind", "") in ("i", "u") and value.dtype.itemsize == 8:
            yield from (int(member) for member in value.reshape(-1))
