"""Rate limit for log lines that unauthenticated callers can cause: one a minute of each kind."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

EVERY_S = 60.0
_MAX_KINDS = 64


class Seldom:
    """Logs the first line of a kind, and then one a minute with the number of lines in between.

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
        """Count one more of ``kind``. Returns the number omitted before, or None if nothing is to be logged."""
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
    """The same limit for a logger that other code writes to; the kind is the message before formatting."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._seldom = Seldom(logging.root, clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record whose kind was logged within the last minute."""
        return self._seldom.count(str(record.msg)) is not None
