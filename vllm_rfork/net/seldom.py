"""Log lines that strangers can cause, at most one a minute of each kind: nobody may fill a disk from outside."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

EVERY_S = 60.0
_MAX_KINDS = 64


class Seldom:
    """Passes the first line of a kind on, and then one a minute, with the number of those left out.

    Args:
        logger: receives the lines.
        clock: replaced in tests.
    """

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}

    def warning(self, kind: str, text: str, *values: object) -> None:
        """Log ``text`` unless a line of this ``kind`` was logged within the last minute."""
        left_out = self.count(kind)
        if left_out is not None:
            self._logger.warning(
                text + (f" ({left_out} more of these since the last line)" if left_out else ""), *values
            )

    def count(self, kind: str) -> int | None:
        """Count one more of ``kind``. If it is to be logged: how many were left out since the last line; else None."""
        now = self._clock()
        at, left_out = self._last.get(kind, (-EVERY_S, 0))
        if now - at < EVERY_S:
            self._last[kind] = (at, left_out + 1)
            return None
        if len(self._last) >= _MAX_KINDS:
            self._last.clear()
        self._last[kind] = (now, 0)
        return left_out


class SeldomFilter(logging.Filter):
    """The same for a logger that other code writes to; the kind is the text before its values are filled in."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._seldom = Seldom(logging.root, clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record whose kind was logged within the last minute."""
        return self._seldom.count(str(record.msg)) is not None
