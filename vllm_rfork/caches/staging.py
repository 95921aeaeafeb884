"""An artifact on its way: its bytes are written and verified piece by piece in a private folder beside the caches.

The folder is in the same file system as the place of installation, so that a file becomes visible there in one step.
Its files have numbers for names: nothing that came over the wire is a name here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vllm_rfork.caches.bounds import MAX_FILES, PIECE_NBYTES
from vllm_rfork.caches.directories import as_cache_error, new_file, open_file, opened_below, opened_root, write_all
from vllm_rfork.caches.manifest import Artifact, check_artifact
from vllm_rfork.caches.paths import OWN
from vllm_rfork.errors import CacheError

#: The directory below a cache root that contains the folders of one user.
STAGING = f"{OWN}staging-{os.geteuid()}"
#: Free bytes that are left to others, who may be serving a model.
KEPT_FREE_NBYTES = 1024**3
#: Age in seconds from which a folder was left behind by a process that died.
ABANDONED_S = 3_600.0
#: Received bytes after which the free space is looked at again: others write to the same disk, receivers among them.
_LOOKED_AFTER_NBYTES = 16 * 1024 * 1024
_SYNCED_AT_ONCE = 8
#: Folders that one call of :func:`remove_abandoned` looks at.
_LOOKED_AT = 256


class Staged:
    """One artifact that is being received. Belongs to one thread at a time.

    Args:
        root: the cache root; it is created if it does not exist.
        artifact: checked here again.
        kept_free_nbytes: the file system must have that many bytes more than the artifact, and while it arrives, than
            the rest of it.

    Attributes:
        complete: all bytes have arrived and are those of the artifact.

    Raises:
        CacheError: the folder cannot be made, or the disk has too little space.
    """

    def __init__(self, root: Path, artifact: Artifact, *, kept_free_nbytes: int = KEPT_FREE_NBYTES) -> None:
        check_artifact(artifact)
        self.root, self.artifact = root, artifact
        self.complete = False
        self._name = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._kept_free_nbytes = kept_free_nbytes
        self._missing_nbytes = self._looked_at_nbytes = artifact.nbytes
        self._number = 0
        self._nbytes = 0
        self._sha256 = hashlib.sha256()
        self._file: int | None = None
        self._gone = False
        with as_cache_error(f"no place for {artifact} in {root}"), opened_root(root, create=True) as top:
            self._check_space(top)
            with contextlib.suppress(FileExistsError):
                os.mkdir(STAGING, 0o700, dir_fd=top)
            with opened_below(top, (STAGING,)) as staging:
                _check_private(staging)
                os.mkdir(self._name, 0o700, dir_fd=staging)
                self._folder = os.open(
                    self._name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=staging
                )

    @property
    def folder(self) -> int:
        """The descriptor of the folder, whose files are ``0``, ``1`` and so on in the order of the artifact.

        Raises:
            CacheError: it has been discarded.
        """
        if self._gone:
            raise CacheError(f"{self.artifact} has been discarded")
        return self._folder

    def write(self, data: bytes) -> None:
        """Append the next bytes of the artifact. After an error, discard it.

        Raises:
            CacheError: more bytes than the artifact has, a file whose SHA-256 is wrong, the disk cannot take them, or
                has too little space for the rest by now.
        """
        left = memoryview(data)
        with as_cache_error(f"{self.artifact} cannot be written to {self.root}"):
            while left:
                if self._number == len(self.artifact.files):
                    raise CacheError(f"{self.artifact} came with more than its {self.artifact.nbytes} bytes")
                file = self.artifact.files[self._number]
                piece = left[: min(file.nbytes - self._nbytes, PIECE_NBYTES)]
                self._append(piece)
                left = left[len(piece) :]

    def finish(self) -> None:
        """Take note that no more bytes come.

        Raises:
            CacheError: bytes are missing.
        """
        with as_cache_error(f"{self.artifact} cannot be written to {self.root}"):
            while self._number < len(self.artifact.files) and not self.artifact.files[self._number].nbytes:
                self._append(memoryview(b""))
        if self._number < len(self.artifact.files):
            file = self.artifact.files[self._number]
            raise CacheError(f"{self.artifact} broke off in {file.path!r} after {self._nbytes} of {file.nbytes} bytes")
        self._sync()
        self.complete = True

    def read(self, path: str, max_nbytes: int) -> bytes:
        """The content of one file, which has been verified.

        Raises:
            CacheError: there is no such file, it is larger than ``max_nbytes``, or cannot be read.
        """
        number = self._verified(path)
        if self.artifact.files[number].nbytes > max_nbytes:
            raise CacheError(f"{self.artifact}: {path!r} is larger than {max_nbytes} bytes")
        with (
            as_cache_error(f"{self.artifact} cannot be read from {self.root}"),
            os.fdopen(open_file(str(number), self.folder), "rb") as file,
        ):
            return file.read(max_nbytes)

    def replace(self, path: str, content: bytes) -> None:
        """Give one file another content, which this worker has written: an index with paths of its own.

        Raises:
            CacheError: there is no such file, or it cannot be written.
        """
        number = str(self._verified(path))
        with as_cache_error(f"{self.artifact} cannot be written to {self.root}"):
            os.unlink(number, dir_fd=self.folder)
            with os.fdopen(new_file(number, self.folder), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def _verified(self, path: str) -> int:
        """The number of a file of the complete artifact. Raises CacheError."""
        for number, file in enumerate(self.artifact.files):
            if file.path == path and self.complete:
                return number
        raise CacheError(f"{self.artifact} has no complete file {path!r}")

    def _append(self, piece: memoryview) -> None:
        """Write a piece of the present file, and close the file if that was its last one."""
        file = self.artifact.files[self._number]
        if self._file is None:
            self._file = new_file(str(self._number), self.folder)
        if self._looked_at_nbytes - self._missing_nbytes >= _LOOKED_AFTER_NBYTES:
            self._looked_at_nbytes = self._missing_nbytes
            self._check_space(self.folder)
        write_all(self._file, piece)
        self._missing_nbytes -= len(piece)
        self._sha256.update(piece)
        self._nbytes += len(piece)
        if self._nbytes < file.nbytes:
            return
        if self._sha256.hexdigest() != file.sha256:
            raise CacheError(f"{self.artifact}: the bytes of {file.path!r} do not have the SHA-256 of the list")
        self._close_file()
        self._number, self._nbytes, self._sha256 = self._number + 1, 0, hashlib.sha256()

    def _check_space(self, directory: int) -> None:
        """Check that the rest of the artifact leaves enough of the disk to others. Raises CacheError, OSError."""
        space = os.fstatvfs(directory)
        free_nbytes = space.f_bavail * space.f_frsize
        if free_nbytes < self._missing_nbytes + self._kept_free_nbytes:
            raise CacheError(
                f"{self.artifact} takes {self._missing_nbytes} more bytes, and {self.root} has {free_nbytes} free, of "
                f"which {self._kept_free_nbytes} are left to others"
            )

    def discard(self) -> None:
        """Remove the folder. Idempotent; what cannot be removed now is removed by a later process."""
        if self._gone:
            return
        self._gone = True
        self._close_file()
        with contextlib.suppress(OSError):
            _empty(self._folder)
        os.close(self._folder)
        with (
            contextlib.suppress(OSError),
            opened_root(self.root) as top,
            opened_below(top, (STAGING,)) as staging,
        ):
            os.rmdir(self._name, dir_fd=staging)

    def _sync(self) -> None:
        """Wait until the disk has all files: else a machine that loses power could keep an empty one under its name.

        At once, because file systems write many files in one go: 400 files took 0.2 s, and 2.7 s one after the other.

        Raises:
            CacheError: the disk cannot take them.
        """

        def sync(number: int) -> None:
            descriptor = open_file(str(number), self.folder)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        with (
            as_cache_error(f"{self.artifact} cannot be written to {self.root}"),
            ThreadPoolExecutor(_SYNCED_AT_ONCE, "rfork-caches-sync") as threads,
        ):
            list(threads.map(sync, range(len(self.artifact.files))))  # raises the first error

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def remove_abandoned(root: Path, *, now: Callable[[], float] = time.time) -> int:
    """Remove the folders that processes left behind when they died; returns their number. Raises nothing."""
    removed = 0
    with contextlib.suppress(OSError), opened_root(root) as top, opened_below(top, (STAGING,)) as staging:
        with os.scandir(staging) as entries:
            names = [entry.name for entry, _ in zip(entries, range(_LOOKED_AT), strict=False)]
        for name in names:
            with contextlib.suppress(OSError):
                found = os.stat(name, dir_fd=staging, follow_symlinks=False)
                if not stat.S_ISDIR(found.st_mode) or now() - found.st_mtime < ABANDONED_S:
                    continue
                with opened_below(staging, (name,)) as folder:
                    _empty(folder)
                os.rmdir(name, dir_fd=staging)
                removed += 1
    return removed


def _check_private(directory: int) -> None:
    """Check that nobody else can exchange what is in ``directory`` between its verification and its installation.

    Raises:
        CacheError: it belongs to another user, or others may write to it.
    """
    found = os.fstat(directory)
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(f"other users may write to the directory {STAGING}: remove it, or set another cache root")


def _empty(folder: int) -> None:
    """Remove the files of a folder; it has no directories. Raises OSError."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry, _ in zip(entries, range(MAX_FILES), strict=False)]
    for name in names:
        os.unlink(name, dir_fd=folder)
