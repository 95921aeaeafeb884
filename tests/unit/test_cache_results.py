"""The header with the results of a worker's caches: it informs people, so nothing in it may stop an announcement."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_rfork.messages import CacheResults, parse_cache_results
from vllm_rfork.messages.cache_results import MAX_LENGTH

WORDS = st.from_regex(r"[a-z_]{1,24}", fullmatch=True)


def test_results_look_as_the_page_says() -> None:
    results = CacheResults({"torch_aot": "hit", "triton": "identity", "inductor": ""}, 38.24)
    assert str(results) == "torch_aot=hit,triton=miss:identity,inductor=miss;saved=38.2"
    assert str(CacheResults()) == ""


@settings(max_examples=50)
@given(st.dictionaries(WORDS, st.one_of(st.just(""), WORDS), max_size=6), st.one_of(st.none(), st.floats(0, 86400)))
def test_results_arrive_as_they_were_sent(kinds: dict[str, str], saved_s: float | None) -> None:
    arrived = parse_cache_results(str(CacheResults(kinds, saved_s)))
    assert arrived.kinds == kinds
    assert (arrived.saved_s is None) == (saved_s is None)
    assert saved_s is None or arrived.saved_s == pytest.approx(saved_s, abs=0.06)


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=30), st.text(max_size=30), max_size=40), st.one_of(st.none(), st.floats()))
def test_any_results_make_a_header_that_fits(kinds: dict[str, str], saved_s: float | None) -> None:
    text = str(CacheResults(kinds, saved_s))
    assert len(text) <= MAX_LENGTH
    assert text.isascii()
    assert "\n" not in text
    assert parse_cache_results(text).kinds.items() <= kinds.items()


@pytest.mark.parametrize(
    "text",
    [
        "",
        ";",
        "=",
        "a",
        "a=won",
        "a=miss:",
        "A=hit",
        "a b=hit",
        "a=hit:x",
        ";saved=-1",
        ";saved=nan",
        ";saved=1e9",
        "a=miss:?",
        "a=miss:hit",
    ],
)
def test_what_is_not_understood_is_ignored(text: str) -> None:
    arrived = parse_cache_results(text)
    assert set(arrived.kinds.values()) <= {""}
    assert arrived.saved_s is None
    assert parse_cache_results("b=hit," + text + ";later=1").kinds["b"] == "hit"


@given(st.text())
def test_no_text_raises(text: str) -> None:
    assert all(len(word) <= 24 for word in parse_cache_results(text).kinds)


def test_a_value_that_is_too_long_counts_as_none() -> None:
    assert parse_cache_results("a=hit," * 80) == CacheResults()
