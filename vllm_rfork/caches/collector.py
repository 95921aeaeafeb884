"""Collection of a directory that compilers have written, for a seed that offers it.

Files are described by their content, and read again when a receiver asks for them: a seed keeps no second copy. A file
that has changed since is refused, and a receiver would notice as well.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_rfork.caches import bounds
from vllm_rfork.caches.directories import as_cache_error, open_file, opened_below, opened_root
from vllm_rfork.caches.manifest import Artifact, ArtifactFile, check_artifact
from vllm_rfork.caches.paths import OWN, Parts, relative_parts
from vllm_rfork.errors import CacheError

#: Names that compilers use for locks and unfinished files, as shell patterns; a directory of such a name is left out as
#: a whole. Read in torch 2.11 and 2.13, Triton 3.6 and FlashInfer 0.6.14.
TEMPORARY = ("*.lock", "*.tmp", "lock", "locks", "tmp.*", "__pycache__", ".autotuner_*", f"{OWN}*")
#: A directory is quiet if nothing in it has changed for that long, in seconds.
QUIET_S = 3.0


@dataclass(frozen=True)
class Stamp:
    """The identity of one file's content as far as the file system tells it."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """The stamp in ``found``."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


Listing = dict[Parts, Stamp]
Chosen = Callable[[Parts], bool]
"""Returns True for the path of a file that counts, and of a directory that contains such files."""


def everything(parts: Parts) -> bool:
    """Choose all files."""
    return True


def listing(root: Path, *, ignored: tuple[str, ...] = TEMPORARY, only: Chosen = everything) -> Listing:
    """The regular files below ``root``, in order of their paths, without temporary ones.

    Args:
        only: names that it does not choose may be anything; they are not looked into.

    Raises:
        CacheError: it cannot be read, contains a link or another special file, or more than the bounds allow. What
            vanishes meanwhile is left out.
    """
    found: Listing = {}
    looked_at = 0
    with as_cache_error(f"{root} cannot be read"), opened_root(root) as top:
        pending: list[Parts] = [()]
        while pending:
            above = pending.pop()
            with (
                contextlib.suppress(FileNotFoundError),
                opened_below(top, above) as directory,
                os.scandir(directory) as entries,
            ):
                for entry in entries:
                    looked_at += 1
                    if looked_at > bounds.MAX_ENTRIES:
                        raise CacheError(f"{root} contains more than {bounds.MAX_ENTRIES} names")
                    parts = (*above, entry.name)
                    if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in ignored) or not only(parts):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        _note(root, parts, entry.stat(follow_symlinks=False), found, pending)
    return dict(sorted(found.items()))


def _note(root: Path, parts: Parts, status: os.stat_result, found: Listing, pending: list[Parts]) -> None:
    relative_parts("/".join(parts))
    if stat.S_ISDIR(status.st_mode):
        pending.append(parts)
    elif stat.S_ISREG(status.st_mode):
        found[parts] = Stamp.of(status)
    else:
        raise CacheError(f"{root.joinpath(*parts)} is not a regular file")


class QuietDirectory:
    """A directory in which a compiler may still be at work.

    Args:
        quiet_s: how long nothing may have changed, in seconds.
        only: see :func:`listing`.
    """

    def __init__(
        self,
        root: Path,
        quiet_s: float = QUIET_S,
        *,
        only: Chosen = everything,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._quiet_s, self._only, self._clock = root, quiet_s, only, clock
        self._seen: Listing | None = None
        self._since = 0.0

    def look(self) -> bool:
        """Return True if nothing has changed for long enough; call it again later otherwise.

        Raises:
            CacheError: see :func:`listing`.
        """
        present = listing(self._root, only=self._only)
        now = self._clock()
        if present != self._seen:
            self._seen, self._since = present, now
            return False
        return now - self._since >= self._quiet_s


@dataclass(frozen=True)
class Collected:
    """An artifact of this process's host, and where its files are."""

    root: Path
    artifact: Artifact
    stamps: tuple[Stamp, ...]

    def pieces(self) -> Iterator[bytes]:
        """The bytes of all files in the order of the artifact, in pieces of at most ``bounds.PIECE_NBYTES``.

        Raises:
            CacheError: a file is gone or has changed since it was collected.
        """
        for file, stamp in zip(self.artifact.files, self.stamps, strict=True):
            with as_cache_error(f"{file.path!r} of {self.artifact} cannot be read"), opened_root(self.root) as top:
                yield from _content(top, relative_parts(file.path), stamp)


def collect(
    root: Path,
    *,
    kind: str,
    name: str,
    identity: dict[str, str],
    seconds: float | None = None,
    only: Chosen = everything,
) -> Collected:
    """Describe the files below ``root``, which must be quiet.

    Args:
        only: see :func:`listing`; leaves out files of other processes.

    Raises:
        CacheError: see :func:`listing`; or there is no file, or a file changes meanwhile.
    """
    chosen = listing(root, only=only)
    nbytes = sum(stamp.nbytes for stamp in chosen.values())
    if len(chosen) > bounds.MAX_FILES or nbytes > bounds.MAX_ARTIFACT_NBYTES:
        raise CacheError(f"{root} has {len(chosen)} files and {nbytes} bytes, more than an artifact may have")
    files = []
    with as_cache_error(f"{root} cannot be read"), opened_root(root) as top:
        for parts, stamp in chosen.items():
            sha256 = hashlib.sha256()
            for piece in _content(top, parts, stamp):
                sha256.update(piece)
            files.append(ArtifactFile("/".join(parts), stamp.nbytes, sha256.hexdigest()))
    artifact = Artifact(kind, name, identity, tuple(files), seconds)
    check_artifact(artifact)
    return Collected(root, artifact, tuple(chosen.values()))


def _content(top: int, parts: Parts, stamp: Stamp) -> Iterator[bytes]:
    """The bytes of one file. Raises CacheError if it is not what ``stamp`` describes, before or after; OSError."""
    path = "/".join(parts)
    with opened_below(top, parts[:-1]) as directory:
        descriptor = open_file(parts[-1], directory)
    try:
        left = stamp.nbytes
        _check_same(descriptor, stamp, path)
        while left:
            piece = os.read(descriptor, min(left, bounds.PIECE_NBYTES))
            if not piece:
                break
            left -= len(piece)
            yield piece
        _check_same(descriptor, stamp, path)
    finally:
        os.close(descriptor)


def _check_same(descriptor: int, stamp: Stamp, path: str) -> None:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or Stamp.of(found) != stamp:
        raise CacheError(f"{path!r} has changed since it was collected")
