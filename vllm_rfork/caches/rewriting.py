"""Indexes inside caches that contain absolute paths: written again with this worker's paths.

Each names files of its own directory. Such an index is parsed, every name must be one of the artifact's files, and the
seed's paths are not used.
"""

from __future__ import annotations

import ast
import pprint
from collections.abc import Set
from pathlib import Path
from typing import Any

import msgspec

from vllm_rfork.caches.safe.parsing import parsed
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.quoting import printable

MAX_INDEX_NBYTES = 4 * 1024 * 1024
#: Compiled graphs of one model; a split model has a few times its layers.
MAX_GRAPHS = 10_000


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    child_paths: dict[str, str]


def triton_group(body: bytes, names: Set[str], directory: Path) -> bytes:
    """Triton's ``__grp__*.json``, which lists the files of one kernel, with paths in ``directory``.

    Read in Triton 3.6 and 3.9 (``FileCacheManager.put_group``): the paths are absolute, so a copy in another directory
    is not found.

    Args:
        names: the other files of the same directory.

    Raises:
        CacheError: not such a list, or it names a file that is not there.
    """
    group = parsed(body, _Group, "a kernel's list of files", MAX_INDEX_NBYTES)
    if not group.child_paths:
        raise CacheError("a kernel's list of files is empty")
    for name in group.child_paths:
        _check_member(name, names)
    return msgspec.json.encode(_Group({name: str(directory / name) for name in group.child_paths}))


def split_graph_index(body: bytes, names: Set[str], directory: Path) -> bytes:
    """vLLM's ``vllm_compile_cache.py``, a Python literal, with paths in ``directory``.

    It maps ``((start, end), graph, compiler)`` to a graph's file, by its name and its absolute path, and a key. Read in
    vLLM 0.26 and 0.32 (``CompilerManager.initialize_cache``), which parse it in the same way.

    Raises:
        CacheError: not such a literal, or it names a file that is not there.
    """
    if len(body) > MAX_INDEX_NBYTES:
        raise CacheError(f"the index of graphs has {len(body)} bytes, more than {MAX_INDEX_NBYTES}")
    try:
        index = ast.literal_eval(body.decode("utf-8"))
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise CacheError(f"the index of graphs cannot be read: {error}") from error
    if not isinstance(index, dict) or not 1 <= len(index) <= MAX_GRAPHS:
        raise CacheError("the index of graphs is not a mapping, is empty, or is too long")
    rewritten = {_graph(key): _handle(value, names, directory) for key, value in index.items()}
    return pprint.pformat(rewritten, indent=4).encode()


def _graph(key: Any) -> tuple[tuple[int, int], int, str]:
    match key:
        case ((int(start), int(end)), int(number), str(compiler)) if compiler.isidentifier() and len(compiler) < 100:
            return (start, end), number, compiler
        case _:
            raise CacheError(f"the index of graphs has the key {printable(key)}")


def _handle(value: Any, names: Set[str], directory: Path) -> dict[str, Any]:
    match value:
        case {"graph_handle": (str(name), str()), "cache_key": str(key), **rest} if not rest and len(key) <= 500:
            _check_member(name, names)
            return {"graph_handle": (name, str(directory / name)), "cache_key": key}
        case _:
            raise CacheError(f"the index of graphs has the value {printable(value)}")


def _check_member(name: str, names: Set[str]) -> None:
    if name not in names or "/" in name:
        raise CacheError(f"an index names {printable(name)}, which is not a file of its directory")
