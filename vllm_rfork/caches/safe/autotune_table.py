"""FlashInfer's autotune table: the fastest variant of each kernel, as ``AutoTuner.save_configs`` writes it.

Read in FlashInfer 0.6.14. Its keys are texts that are looked up and never evaluated; a value is the class name of a
runner and a tactic, which is a number or nested lists of numbers. FlashInfer compares ``_metadata`` with its own
environment, but takes a table without ``_metadata``, and values ``"*"``, on trust: both are refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from vllm_rfork.caches.safe.parsing import parsed
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.quoting import printable

MAX_TABLE_NBYTES = 16 * 1024 * 1024
MAX_ENTRIES = 50_000
#: Characters of a key, which names an operation and the shapes of its inputs.
MAX_KEY = 4_096
MAX_METADATA = 32
#: Lists inside a tactic, and its numbers in all.
MAX_TACTIC_DEPTH = 6
MAX_TACTIC_VALUES = 64
_METADATA = "_metadata"
_RUNNER = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,127}\Z")
_WILDCARD = "*"
#: A tactic is an index, an identifier or a size; -1 is FlashInfer's fallback.
_MAX_NUMBER = 2**31


def checked_table(body: bytes, own_metadata: Mapping[str, str]) -> bytes:
    """The table in ``body``, encoded again by this worker.

    Args:
        own_metadata: of this worker's FlashInfer (``_collect_metadata``); the table must have exactly the same.

    Raises:
        CacheError: not a table, of another environment, or beyond the bounds.
    """
    table = parsed(body, dict[str, Any], "the seed's autotune table", MAX_TABLE_NBYTES)
    if not 2 <= len(table) <= MAX_ENTRIES + 1:
        raise CacheError(f"the seed's autotune table has {len(table) - 1} entries, not 1 to {MAX_ENTRIES}")
    _check_metadata(table.get(_METADATA), own_metadata)
    clean: dict[str, Any] = {_METADATA: dict(own_metadata)}
    for key, value in table.items():
        if key == _METADATA:
            continue
        if len(key) > MAX_KEY or not key.isprintable():
            raise CacheError(f"the seed's autotune table has an unacceptable key: {printable(key)}")
        clean[key] = _entry(key, value)
    return msgspec.json.encode(clean)


def _check_metadata(metadata: Any, own: Mapping[str, str]) -> None:
    if not own or len(own) > MAX_METADATA or any(value in ("", _WILDCARD) for value in own.values()):
        raise CacheError("this worker's FlashInfer does not state its environment")
    if not isinstance(metadata, dict):
        raise CacheError("the seed's autotune table does not state its environment")
    for name in sorted({*own, *metadata}):
        here, there = own.get(name, "not set"), metadata.get(name, "not set")
        if here != there:
            raise CacheError(
                f"the seed's autotune table is for another environment: {printable(name)} is {printable(here)} here "
                f"and {printable(there)} on the seed"
            )


def _entry(key: str, value: Any) -> list[Any]:
    """A runner and a tactic. Raises CacheError for anything else."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str) or not _RUNNER.match(value[0]):
        raise CacheError(f"the seed's autotune table has an unacceptable entry for {printable(key)}")
    if _count(value[1], MAX_TACTIC_DEPTH) > MAX_TACTIC_VALUES:
        raise CacheError(f"the seed's autotune table has an unacceptable tactic for {printable(key)}")
    return value


def _count(tactic: Any, depth: int) -> int:
    """The number of values in ``tactic``; more than the bound if one of them is not acceptable."""
    if isinstance(tactic, list):
        return 1 + sum(_count(each, depth - 1) for each in tactic) if depth else MAX_TACTIC_VALUES + 1
    acceptable = tactic is None or (type(tactic) is int and -1 <= tactic < _MAX_NUMBER)
    return 1 if acceptable else MAX_TACTIC_VALUES + 1
