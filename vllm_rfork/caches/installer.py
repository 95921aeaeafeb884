"""Installation of a verified artifact into one directory of a cache root.

Nothing is overwritten. Each file appears under its name in one step, complete and verified, and the file that makes a
cache be read at all appears last. A process that dies in between leaves files that are correct by themselves.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vllm_rfork.caches.bounds import PIECE_NBYTES
from vllm_rfork.caches.directories import as_cache_error, has_file, new_file, open_file, opened_below, opened_root
from vllm_rfork.caches.host_lock import host_lock
from vllm_rfork.caches.paths import OWN, Parts, relative_parts
from vllm_rfork.caches.staging import Staged
from vllm_rfork.errors import CacheError

#: How long, in seconds, an installation waits for another one on this host: vLLM waits for it.
LOCK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Installed:
    """The result of an installation: files that are new, and files that were there already and stayed as they were."""

    new: int
    kept: int


def is_there(root: Path, directory: Parts, path: str) -> bool:
    """Return True if ``path`` exists in that directory below ``root``: there is nothing to install then.

    Raises:
        CacheError: it cannot be found out.
    """
    parts = (*directory, *relative_parts(path))
    with as_cache_error(f"{root} cannot be read"):
        try:
            with opened_root(root) as top:
                return has_file(top, parts)
        except FileNotFoundError:
            return False


def install(
    staged: Staged,
    directory: Parts,
    *,
    last: str | None = None,
    indexes: Collection[str] = (),
    lock_timeout_s: float = LOCK_TIMEOUT_S,
) -> Installed:
    """Install a complete artifact into ``directory``, and discard the staging folder, whatever happens.

    Args:
        directory: below the cache root, as this worker computed it; never a name from the wire.
        last: the path that makes the cache be read; installed after all others. If it exists, nothing is installed.
            Other files that exist must have the artifact's bytes: names of vLLM's graphs say nothing about the content.
        indexes: patterns of names of files that list other files, as a shell's; installed after those.

    Raises:
        CacheError: the artifact is not complete, another process holds the lock for too long, a directory is a
            symbolic link or not writable, a file exists with other bytes, or the file system has no hard links. Files
            that were installed by this call are removed again.
    """
    try:
        if not staged.complete:
            raise CacheError(f"{staged.artifact} is not complete")
        with (
            as_cache_error(f"{staged.artifact} cannot be installed in {staged.root}"),
            opened_root(staged.root) as root,
            host_lock(root, lock_timeout_s),
        ):
            if last is not None and has_file(root, (*directory, *relative_parts(last))):
                return Installed(0, len(staged.artifact.files))
            return _install(staged, root, directory, last, indexes)
    finally:
        staged.discard()


def _install(staged: Staged, root: int, directory: Parts, last: str | None, indexes: Collection[str]) -> Installed:
    files = [(number, relative_parts(file.path)) for number, file in enumerate(staged.artifact.files)]
    files.sort(key=lambda each: any(fnmatch.fnmatchcase(each[1][-1], pattern) for pattern in indexes))
    if last is not None:
        ready = relative_parts(last)
        if all(parts != ready for _, parts in files):
            raise CacheError(f"{staged.artifact} lacks {last!r}")
        files.sort(key=lambda each: each[1] == ready)
    new: list[Parts] = []
    try:
        with opened_below(root, directory, create=True) as target:
            for number, parts in files:
                if _link(staged.folder, number, target, parts):
                    new.append(parts)
                elif last is not None and not _is_equal(staged.folder, number, target, parts):
                    raise CacheError(f"{staged.artifact}: {'/'.join(parts)!r} is there already, with other bytes")
    except BaseException:
        _remove(root, directory, new)
        raise
    return Installed(len(new), len(files) - len(new))


def _link(folder: int, number: int, target: int, parts: Parts) -> bool:
    """Give a staged file its name; False if there is something of that name. Raises OSError."""
    with opened_below(target, parts[:-1], create=True) as directory:
        try:
            os.link(str(number), parts[-1], src_dir_fd=folder, dst_dir_fd=directory, follow_symlinks=False)
        except FileExistsError:
            return False
    return True


def _is_equal(folder: int, number: int, target: int, parts: Parts) -> bool:
    """Return True if the file that exists is a regular one with the bytes of the staged one. Raises OSError."""
    name = parts[-1]
    with opened_below(target, parts[:-1]) as directory:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_size != os.stat(str(number), dir_fd=folder).st_size:
            return False
        with (
            os.fdopen(open_file(name, directory), "rb") as existing,
            os.fdopen(open_file(str(number), folder), "rb") as arrived,
        ):
            while piece := arrived.read(PIECE_NBYTES):
                if existing.read(len(piece)) != piece:
                    return False
    return True


def _remove(root: int, directory: Parts, new: list[Parts]) -> None:
    """Remove the files that this call has installed."""
    for parts in reversed(new):
        with contextlib.suppress(OSError), opened_below(root, (*directory, *parts[:-1])) as above:
            os.unlink(parts[-1], dir_fd=above)


def install_file(root: Path, directory: Parts, name: str, content: bytes) -> bool:
    """Write a new file, complete or not at all; False if there is something of that name already.

    For JSON caches, whose ``content`` this worker has encoded itself.

    Raises:
        CacheError: it cannot be written.
    """
    (leaf,) = relative_parts(name)
    temporary = f"{OWN}{os.getpid()}-{os.urandom(8).hex()}"
    with (
        as_cache_error(f"{name} cannot be written to {root.joinpath(*directory)}"),
        opened_root(root, create=True) as top,
        opened_below(top, directory, create=True) as target,
    ):
        descriptor = new_file(temporary, target)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, leaf, src_dir_fd=target, dst_dir_fd=target, follow_symlinks=False)
        except FileExistsError:
            return False
        finally:
            os.unlink(temporary, dir_fd=target)
    return True
