"""A JSON object of any size, written some entries at a time, so that it is never in memory as a whole."""

from __future__ import annotations

from collections.abc import AsyncIterator

from vllm_rfork.planner.http import valid_json


async def json_chunks(parts: AsyncIterator[tuple[str, object]]) -> AsyncIterator[bytes]:
    """Yield the text of the object with the fields ``parts``.

    A field whose value is a list or a dictionary may come several times in a row, with more entries each time.
    """
    begun, closing, separator = "", b"{", b""
    async for name, value in parts:
        text = valid_json.encode(value)
        if name != begun:
            head = closing + (b"," if begun else b"") + valid_json.encode(name) + b":"
            begun, separator = name, b""
            if isinstance(value, (list, dict)):
                closing = text[-1:]
                yield head + text[:1]
            else:
                closing = b""
                yield head + text
                continue
        if value:
            yield separator + text[1:-1]
            separator = b","
    yield closing + b"}"
