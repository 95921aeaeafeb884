"""Directories by descriptor: no step below a root follows a symbolic link, even if a name changes meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vllm_rfork.caches.paths import Parts
from vllm_rfork.errors import CacheError

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@contextlib.contextmanager
def as_cache_error(what: str) -> Iterator[None]:
    """Turn the system's errors into CacheError; ``what`` failed, for the message."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{what}: {error.strerror or type(error).__name__}") from error


@contextlib.contextmanager
def opened_root(root: Path, *, create: bool = False) -> Iterator[int]:
    """The descriptor of ``root``. Links on the way to it are the operator's choice and are followed.

    Raises:
        OSError: it is not a directory, or may not be opened or created.
    """
    if create:
        root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, _DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened_below(root: int, parts: Parts, *, create: bool = False) -> Iterator[int]:
    """The descriptor of the directory at ``parts`` below the open directory ``root``; ``root`` again for no parts.

    Raises:
        OSError: a part is missing, is a symbolic link (``ENOTDIR`` or ``ELOOP``) or not a directory.
    """
    descriptor = os.dup(root)
    try:
        for part in parts:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            below = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def has_file(root: int, parts: Parts) -> bool:
    """Return True if there is anything at ``parts`` below ``root``, a link that leads nowhere included."""
    try:
        with opened_below(root, parts[:-1]) as directory:
            os.stat(parts[-1], dir_fd=directory, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_file(name: str, directory: int) -> int:
    """The descriptor of an existing file in the open directory, for reading; a link or a pipe is not waited for.

    Raises:
        OSError: it is missing, is a symbolic link, or may not be read.
    """
    return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)


def new_file(name: str, directory: int) -> int:
    """The descriptor of a new file in the open directory, for writing.

    Raises:
        OSError: there is something of that name, or it may not be created.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o666, dir_fd=directory)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of ``data``. Raises OSError."""
    while data:
        data = data[os.write(descriptor, data) :]
