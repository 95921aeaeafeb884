"""Files that are read again when they change, so that a rotated secret is used without a restart."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from vllm_rfork.errors import ConfigError

T = TypeVar("T")


class Reloaded(Generic[T]):
    """The content of files as ``read`` returns it, read again when one of them has changed.

    Args:
        what: its name in the log.
        read: raises ConfigError if the files cannot be used; so does the constructor then.
        logger: receives one line for each change.
        clock: replaced in tests.
        recheck_s: seconds between two checks of the files.
    """

    def __init__(
        self,
        what: str,
        paths: tuple[str, ...],
        read: Callable[[], T],
        logger: logging.Logger,
        *,
        clock: Callable[[], float] = time.monotonic,
        recheck_s: float = 1.0,
    ) -> None:
        self._what = what
        self._paths = paths
        self._read = read
        self._logger = logger
        self._clock = clock
        self._recheck_s = recheck_s
        self._checked_at = clock()
        self._version = self._versions()  # before reading: a change in between is seen the next time
        self._value = read()
        self._problem = ""

    def current(self) -> T:
        """The latest usable content; files are checked once ``recheck_s`` have passed. Never raises."""
        now = self._clock()
        if self._paths and now - self._checked_at >= self._recheck_s:
            self._checked_at = now
            self._refresh()
        return self._value

    def _refresh(self) -> None:
        version = self._versions()
        if version == self._version:
            return
        try:
            self._value = self._read()
        except ConfigError as error:
            if str(error) != self._problem:
                self._logger.warning("%s changed and cannot be used; the earlier stays: %s", self._what, error)
            self._problem = str(error)  # and the version stays, so that it is tried again
            return
        self._version = version
        self._problem = ""
        self._logger.info("%s re-read", self._what)

    def _versions(self) -> tuple[object, ...]:
        return tuple(_version(path) for path in self._paths)


def _version(path: str) -> object:
    try:
        stat = os.stat(path)
    except OSError as error:
        return error.errno
    return stat.st_mtime_ns, stat.st_ino, stat.st_size
