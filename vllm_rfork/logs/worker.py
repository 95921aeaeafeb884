"""The loggers of a worker: one filter puts ``RFork:`` in front of each of their lines and makes them printable.

vLLM's log holds the lines of many packages, so every line of this one begins the same way. No call site types the
prefix. Lines quote planners, seeds and requests, so what would forge another line or steer a terminal is escaped here,
whatever the call site did. The planner has a log of its own and does not use this module. Must not import anything of
the package but ``quoting``.
"""

from __future__ import annotations

import logging

from vllm_rfork.logs.quoting import MAX_LINE, printable

PREFIX = "RFork: "


class Prefixed(logging.Filter):
    """Puts :data:`PREFIX` in front of a record's message, once, and escapes what does not print in it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change ``record`` in place; never drops one."""
        if not str(record.msg).startswith(PREFIX):  # a record may come back, from a queue for example
            record.msg = f"{PREFIX}{record.msg}"
        message = record.getMessage()
        if (shown := printable(message, MAX_LINE)) != message:
            record.msg, record.args = shown, None
        return True


#: Characters of a text that is logged again.
SHORT = 160


class Told:
    """The long texts that one load has logged: a failure is often reported where it happens and where it ends."""

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def once(self, text: object) -> str:
        """``text``, or its first :data:`SHORT` characters where this load has logged the whole."""
        text = str(text)
        if len(text) <= SHORT:
            return text
        if text in self._texts:
            return f"{text[:SHORT]}… (the whole text is in an earlier line)"
        self._texts.add(text)
        return text


_PREFIXED = Prefixed()


def worker_logger(name: str) -> logging.Logger:
    """The logger called ``name``, with the prefix.

    A filter of a logger sees that logger's own records alone, not its children's: each module asks here.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_PREFIXED)  # does nothing the second time
    return logger
