"""Parsing of JSON from another machine, bounded before it takes memory."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from vllm_rfork.errors import CacheError

T = TypeVar("T")

#: Lists and mappings, and values, that one JSON cache may contain: each takes up to 64 bytes or more in memory.
MAX_CONTAINERS = 500_000
MAX_VALUES = 2_000_000


def parsed(body: bytes, kind: type[T], what: str, max_nbytes: int) -> T:
    """``body`` as ``kind``.

    Args:
        what: the cache, for messages.

    Raises:
        CacheError: longer than ``max_nbytes``, not JSON, or not of that type. ``NaN`` and ``Infinity``, which Python
            accepts and JSON does not have, are refused.
    """
    containers = body.count(b"[") + body.count(b"{")
    if len(body) > max_nbytes or containers > MAX_CONTAINERS or body.count(b",") > MAX_VALUES:
        raise CacheError(f"{what} has {len(body)} bytes; receivers read {max_nbytes}, and bounded numbers of values")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CacheError(f"{what} cannot be read: {error}") from error
