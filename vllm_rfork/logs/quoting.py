"""External text in messages, logs and tables: escaped, so that it cannot forge a line or steer a terminal, and cut.

Manifests, answers of planners and seeds, request paths and seed keys are written by others. Errors (``errors.py``), the
worker's loggers (``logs/worker.py``), the planner's log formats and the command line's tables all come here. Must not
import anything of the package.
"""

from __future__ import annotations

#: Characters of one quoted value: a name, a key, a setting.
MAX_QUOTED = 200
#: Characters of one error's text, which may quote many.
MAX_MESSAGE = 8_000
#: Characters of one log line's message.
MAX_LINE = 32_000


def printable(text: object, max_length: int = MAX_QUOTED) -> str:
    """``text`` as one printable line of at most about ``max_length`` characters.

    What does not print (line breaks, ESC and other control characters, characters that change the direction of
    writing, lone surrogates) is written as Python writes it in a literal. A text that is cut says how long it was.
    Printable text that is short enough is returned as it is.
    """
    text = str(text)
    shown = text if len(text) <= max_length else text[:max_length]
    if not shown.isprintable():
        shown = "".join(map(_escaped, shown))
        if len(shown) > max_length:  # an escape has up to ten characters
            shown = shown[:max_length]
            return f"{shown}… ({len(text)} characters)"
    return shown if len(text) <= max_length else f"{shown}… ({len(text)} characters)"


def counted(count: int, noun: str) -> str:
    """``count`` and ``noun``, which takes an s as its plural: ``1 seed``, ``2 seeds``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
