"""Relative paths of files in caches: one grammar, for what is collected and for what arrives."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vllm_rfork.caches.bounds import MAX_DEPTH, MAX_PART, MAX_PATH
from vllm_rfork.errors import CacheError

#: The beginning of every name that this package gives to files of its own in a cache directory.
OWN = ".rfork-"
#: A name that cannot be an option of a command, an absolute path, a drive, or text in another alphabet.
_PART = re.compile(rf"[A-Za-z0-9_.+=@][A-Za-z0-9_.+=@,~%-]{{0,{MAX_PART - 1}}}\Z")

Parts = tuple[str, ...]


def relative_parts(path: str) -> Parts:
    """The parts of ``path``, which is relative, has ``/`` as separator, and stays below its directory.

    Raises:
        CacheError: anything else: an absolute path, ``..``, an empty part, a character outside the grammar, a name
            of this package's own files, or more than the bounds allow.
    """
    if len(path) > MAX_PATH:
        raise CacheError(f"the path {path!r} is longer than {MAX_PATH} characters")
    parts = tuple(path.split("/"))
    if len(parts) > MAX_DEPTH + 1:
        raise CacheError(f"the path {path!r} has more than {MAX_DEPTH} directories")
    for part in parts:
        if not _PART.match(part) or part in (".", "..") or part.startswith(OWN):
            raise CacheError(f"the path {path!r} contains {part!r}, which is not an acceptable name")
    return parts


def parts_below(root: Path, directory: Path) -> Parts:
    """The parts of ``directory`` below ``root``. Compares texts and does not follow links.

    Raises:
        CacheError: it is not below ``root``.
    """
    try:
        relative = directory.relative_to(root)
    except ValueError:
        raise CacheError(f"{directory} is not below {root}") from None
    return relative_parts(relative.as_posix())


def check_tree(paths: Iterable[Parts]) -> None:
    """Check that the paths can exist beside each other.

    Raises:
        CacheError: a path is there twice, or one is a directory of another.
    """
    files: set[Parts] = set()
    directories: set[Parts] = set()
    for parts in paths:
        if parts in files:
            raise CacheError(f"the path {'/'.join(parts)!r} occurs twice")
        files.add(parts)
        directories.update(parts[:count] for count in range(1, len(parts)))
    for both in files & directories:
        raise CacheError(f"the path {'/'.join(both)!r} is a file and a directory")
