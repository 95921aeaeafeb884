"""Values of headers: text, numbers and labels, each with one grammar and a bound."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping

MAX_HEADER_LENGTH = 8000
#: A label's name, and its value.
LABEL = re.compile(r"[A-Za-z0-9_.-]{1,63}\Z")
MAX_LABELS = 16

_CHARSET_PREFIX = "UTF-8''"
_PLAIN = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z")


class BadMessage(ValueError):
    """A header is missing or unusable; the text names it and the reason. A planner answers 400."""


def encode_text(text: str) -> str:
    """``text`` as a header value: unchanged if it is printable ASCII, else RFC 8187 (``UTF-8''caf%C3%A9``).

    Injective. The result never contains a line break, so no key can inject a header. Plain keys look as legacy clients
    send them.
    """
    if _PLAIN.match(text) and not text.startswith(_CHARSET_PREFIX):
        return text
    return _CHARSET_PREFIX + urllib.parse.quote(text, safe="", encoding="utf-8", errors="surrogatepass")


def decode_text(value: str) -> str:
    """The inverse of :func:`encode_text`.

    Raises:
        BadMessage: the escaped form is not UTF-8.
    """
    if not value.startswith(_CHARSET_PREFIX):
        return value
    try:
        return urllib.parse.unquote(value[len(_CHARSET_PREFIX) :], encoding="utf-8", errors="surrogatepass")
    except UnicodeDecodeError as error:
        raise BadMessage(f"not valid UTF-8 in an RFC 8187 value: {value[:80]!r}") from error


def shortened(text: str, length: int) -> str:
    """The first ``length`` characters of ``text``, or as many as :func:`encode_text` fits into a header.

    For text that no decision depends on: a header that is too long refuses the call, and each character outside ASCII
    takes up to 12 in it.
    """
    text = text[:length]
    while len(encode_text(text)) > MAX_HEADER_LENGTH:
        text = text[: len(text) * 9 // 10]
    return text


def header(headers: Mapping[str, str], name: str) -> str | None:
    """Header ``name`` in either spelling (``SEED_KEY``, ``SEED-KEY``), stripped; None if it is missing.

    nginx drops names with underscores by default. ``headers`` must be a case-insensitive mapping.
    """
    value = headers.get(name)
    if value is None and "_" in name:
        value = headers.get(name.replace("_", "-"))
    return None if value is None else value.strip()


def required(headers: Mapping[str, str], name: str) -> str:
    """As :func:`header`, for a header that must not be missing or empty.

    Raises:
        BadMessage: missing, empty or longer than ``MAX_HEADER_LENGTH``.
    """
    value = header(headers, name)
    if not value:
        raise BadMessage(f"missing header {name}")
    if len(value) > MAX_HEADER_LENGTH:
        raise BadMessage(f"header {name} is longer than {MAX_HEADER_LENGTH} characters")
    return value


#: The grammar of numbers from outside. Python's ``int`` and ``float`` also accept other scripts' digits, ``1_0``,
#: ``+1``, ``-0``, ``1e3``, ``nan``, and numbers so small or so large that a quotient is infinite.
_INTEGER = re.compile(r"(?:0|[1-9][0-9]{0,15})\Z")
_DECIMAL = re.compile(r"(?:0|[1-9][0-9]{0,8})(?:\.[0-9]{1,20})?\Z")


def integer(value: str, name: str, *, minimum: int, maximum: int = 2**31 - 1, kind: str = "header") -> int:
    """``value`` as a decimal integer within bounds: ASCII digits, no sign, no leading zero, at most 16 of them.

    ``kind``, a header or a query parameter, is for the error's text.

    Raises:
        BadMessage: anything else; the text contains ``name`` and the bounds.
    """
    if not _INTEGER.match(value) or not minimum <= int(value) <= maximum:
        raise BadMessage(f"{kind} {name} must be an integer from {minimum} to {maximum}, got {value[:40]!r}")
    return int(value)


def seconds(value: str, name: str, *, maximum: float) -> float:
    """``value`` as seconds from 0 to ``maximum``: ASCII digits with an optional fraction, no sign, no exponent.

    Raises:
        BadMessage: anything else.
    """
    if not _DECIMAL.match(value) or float(value) > maximum:
        raise BadMessage(f"header {name} must be a number of seconds from 0 to {maximum:g}, got {value[:40]!r}")
    return float(value)


def seconds_text(number: float) -> str:
    """``number`` of seconds (0 or more) as :func:`seconds` reads it, to a thousandth; never 0 for more than 0."""
    text = f"{max(number, 0.001) if number > 0 else 0:.3f}"
    return text.rstrip("0").rstrip(".")


def parse_labels(text: str) -> dict[str, str]:
    """Topology labels ``host=a,rack=b`` as a mapping, without those whose value is empty.

    Raises:
        BadMessage: not of that form, or more than ``MAX_LABELS`` of them; names and values match :data:`LABEL`.
    """
    labels: dict[str, str] = {}
    for pair in filter(None, (each.strip() for each in text.split(","))):
        name, separator, value = pair.partition("=")
        name, value = name.strip(), value.strip()
        if not separator or not LABEL.match(name) or (value and not LABEL.match(value)):
            raise BadMessage(f"labels must look like host=a,rack=b, got {pair[:80]!r}")
        if value:
            labels[name] = value
    if len(labels) > MAX_LABELS:
        raise BadMessage(f"more than {MAX_LABELS} labels")
    return labels
