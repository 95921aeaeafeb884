"""JSON that every reader accepts, whatever texts and numbers the data contains."""

from __future__ import annotations

import re
from typing import Any

import msgspec

_SURROGATE = re.compile("[\ud800-\udfff]")


def encode(data: object) -> bytes:
    """Return ``data`` as JSON. Numbers that JSON cannot represent (infinite, not a number) become null.

    A text that arrived as other bytes than UTF-8 contains surrogates, which JSON text cannot: each is written as six
    characters, such as ``\\udcff``. Objects of other types become their ``str``.
    """
    try:
        return msgspec.json.encode(data, enc_hook=str)
    except UnicodeEncodeError:
        return msgspec.json.encode(_without_surrogates(data), enc_hook=_text)


def _without_surrogates(data: Any) -> Any:
    if isinstance(data, str):
        return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", data)
    if isinstance(data, dict):
        return {_without_surrogates(key): _without_surrogates(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_surrogates(each) for each in data]
    return data


def _text(value: object) -> Any:
    return _without_surrogates(str(value))
