"""Bearer tokens: the one form of a token file, and the one comparison, for planner and workers.

A token file is UTF-8 text, with or without a byte order mark. Each line is a token, a comment (it begins with ``#``) or
blank; spaces and tabs around it do not count. One token, or two while they are rotated. A token consists of printable
ASCII characters, because nothing else arrives unchanged in a header. No error message here contains a token.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from vllm_rfork.errors import ConfigError

MAX_TOKENS = 2
MAX_FILE_NBYTES = 64 * 1024

_ACCEPTS = "a file with one token, or two while rotating, one a line; lines that begin with # are comments"
_TOKEN = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z")


def read_file(path: str | Path, field: str) -> tuple[str, ...]:
    """The tokens in the file at ``path``, one or two, the one to send first.

    Raises:
        ConfigError: names ``field``; the file cannot be read, or does not have the form above.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_FILE_NBYTES + 1)
    except OSError as error:
        raise ConfigError(field, f"cannot be read ({error.strerror or type(error).__name__})", _ACCEPTS) from error
    if len(content) > MAX_FILE_NBYTES:
        raise ConfigError(field, f"is larger than {MAX_FILE_NBYTES} bytes", _ACCEPTS)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(field, "is not UTF-8 text", _ACCEPTS) from None
    lines = [line.strip(" \t\r") for line in text.split("\n")]
    tokens = tuple(checked(line, field) for line in lines if line and not line.startswith("#"))
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise ConfigError(field, f"contains {len(tokens)} tokens", _ACCEPTS)
    return tokens


def checked(token: str, field: str) -> str:
    """``token`` as it is, if it can be one.

    Raises:
        ConfigError: names ``field``; empty, or characters that do not arrive unchanged in a header.
    """
    if not _TOKEN.match(token):
        problem = "contains a token with characters other than printable ASCII" if token.strip() else "is blank"
        raise ConfigError(field, problem, "a token of printable ASCII characters")
    return token


def admits(tokens: Sequence[str], authorization: str | None) -> bool:
    """Return True if the ``Authorization`` header has one of ``tokens``, or if there are none."""
    if not tokens:
        return True
    scheme, _, given = (authorization or "").partition(" ")
    # All are compared, so that the time does not depend on which one matches.
    matches = [equal(given.strip(), each) for each in tokens]
    return scheme.lower() == "bearer" and any(matches)


def equal(one: str, other: str) -> bool:
    """Compare in constant time, so that a token or key cannot be guessed letter by letter."""
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode("utf-8", "surrogatepass"))
