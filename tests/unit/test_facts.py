"""The facts behind a fingerprint, short and bounded, and the sentence that names what differs."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_rfork.manifest.facts import MAX_FACTS, MAX_NAME, MAX_VALUE, described, differences, short_facts


def test_facts_are_flat_texts() -> None:
    facts = {
        "options": {"model": {"dtype": "torch.bfloat16", "rope": [1, 2]}},
        "draft": False,
        "dummy": None,
        "empty": {},
    }
    assert short_facts(facts) == {
        "options.model.dtype": "bfloat16",
        "options.model.rope": "[1, 2]",
        "draft": "false",
        "dummy": "null",
        "empty": "{}",
    }


def test_differences_read_as_a_sentence() -> None:
    own = {"options.model.dtype": "bfloat16", "torch": "2.9"}
    others = [({"options.model.dtype": "float16", "torch": "2.9"}, 3), ({"options.model.dtype": "float32"}, 1)]
    assert described(differences(own, others)) == (
        "dtype: bfloat16 here, float16 on 3 seeds, float32 on 1 seed; torch: 2.9 here, not set on 1 seed"
    )


def test_equal_ends_are_told_by_their_whole_path() -> None:
    own = {"options.model.dtype": "bfloat16", "hf_config.dtype": "bfloat16"}
    other = {"options.model.dtype": "float16", "hf_config.dtype": "float16"}
    assert [text.partition(":")[0] for text in differences(own, [(other, 1)])] == list(own)


def test_long_values_are_cut_and_still_differ() -> None:
    here, there = (short_facts({"modules": ["x" * 500, end]}) for end in ("a", "b"))
    assert len(here["modules"]) <= MAX_VALUE
    assert len(differences(here, [(there, 1)])) == 1


@pytest.mark.parametrize(
    "facts",
    [
        {"deep": {str(n): {str(m): m for m in range(100)} for n in range(100)}},
        {str(n): n for n in range(3 * MAX_FACTS)},
        {"n" * 5000: {"m" * 5000: "v" * 10**6}},
    ],
)
def test_whatever_a_configuration_holds_the_facts_are_bounded(facts: dict[str, Any]) -> None:
    short = short_facts(facts)
    assert 0 < len(short) <= MAX_FACTS
    assert all(len(name) <= MAX_NAME + 30 and len(value) <= MAX_VALUE for name, value in short.items())


def test_what_may_be_secret_is_a_digest() -> None:
    private = {"hub_token": "s3cret", "servers": [{"password": "s3cret"}]}
    short = short_facts({"additional_config": private, "environment": {"VLLM_API_KEY": "s3cret"}, "tokens": 7})
    assert short["tokens"] == "7"
    assert "s3cret" not in str(short)
    assert differences(short, [(short_facts({"additional_config": {"hub_token": "other"}}), 1)])


def test_no_text_of_a_seed_forges_a_line() -> None:
    assert "\n" not in described(differences(short_facts({"a": "x\nRFork: forked"}), [({}, 1)]))


def test_many_differences_are_counted() -> None:
    own = {f"fact{n}": "1" for n in range(30)}
    assert described(differences(own, [({}, 2)])).endswith("; and 20 more")
