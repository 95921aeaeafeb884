"""The mark of an index that this package has installed and vLLM has not loaded yet.

vLLM ends if an index names a file that it cannot load, and would end again at each restart. So a mark lies beside the
index until all is loaded. Its process holds a lock on it, which the kernel releases when the process dies.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from vllm_rfork.caches.paths import OWN

_NAME = f"{OWN}unproven"
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class Unproven:
    """The mark of the index ``index``; one object for each attempt to load it."""

    def __init__(self, index: Path) -> None:
        self._index, self._path = index, index.with_name(_NAME)
        self._descriptor: int | None = None

    def remove_left(self) -> bool:
        """Remove the index of a process that died before it had loaded it; True if there was one.

        Raises:
            OSError: it cannot be removed.
        """
        try:
            descriptor = os.open(self._path, _FLAGS)
        except FileNotFoundError:
            return False
        try:
            if not _locked(descriptor):
                return False  # another process is loading it
            self._index.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        return True

    def begin(self) -> None:
        """Set the mark, before the index is installed; another process's mark is as good. Raises OSError."""
        descriptor = os.open(self._path, _FLAGS | os.O_CREAT, 0o600)
        if _locked(descriptor):
            self._descriptor = descriptor
        else:
            os.close(descriptor)

    def end(self) -> None:
        """Remove the mark if it is this object's. Raises OSError."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                self._path.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def _locked(descriptor: int) -> bool:
    # Not flock: a child of the process that died would still hold it.
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
