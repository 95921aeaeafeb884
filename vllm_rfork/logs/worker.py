"""The loggers of a worker: one filter adds the prefix ``RFork:`` to every line and makes the line printable.

vLLM's log contains the lines of many packages, so every line of this one begins the same way. Lines quote planners,
seeds and requests, so characters that would forge another line or steer a terminal are escaped here. The planner has
its own log and does not use this module.
"""

from __future__ import annotations

import logging

from vllm_rfork.logs.quoting import MAX_LINE, printable

PREFIX = "RFork: "


class Prefixed(logging.Filter):
    """Adds :data:`PREFIX` to a record's message, once, and escapes unprintable characters."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change ``record`` in place; no record is dropped."""
        if not str(record.msg).startswith(PREFIX):  # a record may come back, from a queue for example
            record.msg = f"{PREFIX}{record.msg}"
        message = record.getMessage()
        if (shown := printable(message, MAX_LINE)) != message:
            record.msg, record.args = shown, None
        return True


#: Characters of a text that is logged again.
SHORT = 160


class LoggedTexts:
    """The long texts that one load has logged: a failure is often logged where it happens and where it ends."""

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def once(self, text: object) -> str:
        """``text``, or its first :data:`SHORT` characters if this load has logged all of it."""
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

    A logger's filter applies to its own records only, not to its children's: every module calls this function.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_PREFIXED)  # does nothing the second time
    return logger
