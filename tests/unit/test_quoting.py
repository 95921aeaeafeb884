"""External text in errors, logs and tables cannot forge a line, steer a terminal or fill a disk."""

from __future__ import annotations

import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rfork.errors import ConfigError, EngineError, ForkError, ManifestMismatch, SeedError, VerificationError
from vllm_rfork.logs.quoting import MAX_LINE, MAX_MESSAGE, printable
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.net.client import BoundedHttp
from vllm_rfork.planner.logs import JsonLines, TextLines

#: A forged line, a terminal's escapes (7 and 8 bit), a change of writing direction, a lone surrogate, NUL.
HOSTILE = "a\nERROR forged\r\x1b]0;title\x07\x9b2J\u202egnp.exe\u2028\udc80\x00z"


@given(st.text(alphabet=st.characters(), max_size=400), st.integers(1, 300))
def test_any_text_becomes_one_printable_short_line(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + len("… (400 characters)")
    assert len(text) <= limit or shown.endswith(f"… ({len(text)} characters)")
    if text.isprintable() and len(text) <= limit:
        assert shown == text


def test_what_does_not_print_is_written_as_a_literal() -> None:
    assert printable("a\nb\x1b[1m") == r"a\nb\x1b[1m"
    assert printable("café\udc80\u202e") == r"café\udc80\u202e"


@pytest.mark.parametrize(
    "error",
    [
        ForkError(HOSTILE * 100_000),
        SeedError(HOSTILE),
        EngineError("nixl", "connect", HOSTILE, code=HOSTILE),
        VerificationError(HOSTILE),
        ConfigError("rfork_engine", HOSTILE, "nixl"),
        ManifestMismatch([HOSTILE * 100_000] * 30),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_error_carries_what_does_not_print(error: Exception) -> None:
    assert str(error).isprintable()
    assert "ERROR forged" in str(error)
    assert len(str(error)) < MAX_MESSAGE + 50
    if isinstance(error, ManifestMismatch):
        assert len(error.differences) == 30
        assert all(each.isprintable() and len(each) < 700 for each in error.differences)


@pytest.mark.parametrize("form", ["argument", "message", "error"])
def test_a_workers_line_is_printable_and_short(form: str) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = worker_logger("vllm_rfork.example")
    logger.addHandler(handler)
    try:
        long = HOSTILE + "x" * 1_000_000
        if form == "argument":
            logger.warning("seed %s failed, 100 %% of %d", long, 3)
        elif form == "message":
            logger.warning(long)
        else:
            logger.warning(ValueError(long))
    finally:
        logger.removeHandler(handler)
    (line,) = written.getvalue().removesuffix("\n").split("\n")
    assert line.isprintable()
    assert line.startswith("RFork: ")
    assert r"a\nERROR forged\r\x1b]0;title\x07\x9b2J\u202egnp.exe\u2028\udc80\x00z" in line
    assert len(line) < MAX_LINE + 50


@pytest.mark.parametrize("lines", [TextLines(), JsonLines()], ids=["text", "json"])
def test_a_planners_line_is_printable_and_short(lines: logging.Formatter) -> None:
    record = logging.LogRecord("planner", logging.INFO, "", 0, "seed %s", (HOSTILE + "x" * 1_000_000,), None)
    record.key = HOSTILE
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    text = lines.format(record)
    assert len(text) < 2 * MAX_LINE
    if isinstance(lines, JsonLines):
        assert "\n" not in text
        assert text.isascii()
        assert json.loads(text)["key"] == HOSTILE.replace("\udc80", "\\udc80")  # it is no text in JSON
        return
    assert all(line.isprintable() for line in text.split("\n"))
    first, *rest = text.split("\n")
    assert first.startswith("INFO ")
    assert not any(line.startswith("ERROR forged\\") and "planner" in line for line in rest)


async def test_an_answer_of_a_stranger_is_quoted_in_one_line() -> None:
    """An HTTP refusal's text, as a planner or a seed sends it, within an error."""
    http = BoundedHttp("planner", ForkError)
    with pytest.raises(ForkError) as caught:
        await http.exchange("GET", "http://127.0.0.1:1/\x1b[2J\nERROR", timeout_s=2.0)
    assert str(caught.value).isprintable()
