"""External text in messages, logs and tables: escaped, so that it forges no line and controls no terminal; shortened.

Manifests, answers of planners and seeds, request paths and seed keys come from outside. Errors (``errors.py``), the
loggers of workers (``logs/worker.py``), the planner's log formats and the tables of the command line use this module.
"""

from __future__ import annotations

#: Characters of one quoted value: a name, a key, a setting.
MAX_QUOTED = 200
#: Characters of one error's text, which may quote several values.
MAX_MESSAGE = 8_000
#: Characters of one log line's message.
MAX_LINE = 32_000


def printable(text: object, max_length: int = MAX_QUOTED) -> str:
    """``text`` as one printable line of at most about ``max_length`` characters.

    Unprintable characters (line breaks, ESC and other control characters, characters that change the direction of
    writing, lone surrogates) are escaped as in a Python literal. A shortened text ends with its original length. Short
    printable text is returned unchanged.
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
    """``count`` and ``noun`` with its plural in s: ``1 seed``, ``2 seeds``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
