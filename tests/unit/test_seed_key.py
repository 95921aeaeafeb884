"""The seed key is pinned text; the fingerprint is pinned and moves with every fact."""

from __future__ import annotations

import pytest

from vllm_rfork.messages import decode_text, encode_text
from vllm_rfork.seed_key import WorkerIdentity, build_fingerprint, build_seed_key, seed_key_parts

PINNED = {
    "/models/q$prod$kv_both$0$0": ("/models/q", "prod", WorkerIdentity("kv_both", 0, 0), "$"),
    "/models/dsv4$decode$kv_consumer$0$pp1$3$ep5$draft": (
        "/models/dsv4",
        "decode",
        WorkerIdentity("kv_consumer", 0, 3, pp_rank=1, ep_rank=5, is_draft=True),
        "$",
    ),
    "m|s|kv_producer|2|7": ("m", "s", WorkerIdentity("kv_producer", 2, 7), "|"),
    "m$s$kv_both$0$0$ep0": ("m", "s", WorkerIdentity("kv_both", 0, 0, ep_rank=0), "$"),
    "m$s$kv_both$0$pp0$0$draft": ("m", "s", WorkerIdentity("kv_both", 0, 0, pp_rank=0, is_draft=True), "$"),
}


@pytest.mark.parametrize("key", PINNED)
def test_keys_are_the_documented_strings(key: str) -> None:
    model_url, strategy, identity, separator = PINNED[key]
    assert build_seed_key(model_url, strategy, identity, separator=separator) == key


def test_the_local_rank_is_not_part_of_the_key() -> None:
    keys = {build_seed_key("m", "s", WorkerIdentity("kv_both", 0, 0, local_rank=rank)) for rank in range(4)}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "text", ["/models/q$prod", "模型/千问", "a\r\nX-Injected: 1", " padded ", "UTF-8''x", "100%", "é"]
)
def test_any_text_survives_a_header_and_injects_nothing(text: str) -> None:
    wire = encode_text(build_seed_key(text, "s", WorkerIdentity("kv_both", 0, 0)))
    assert wire.isascii()
    assert wire.isprintable()
    assert decode_text(wire) == f"{text}$s$kv_both$0$0"


FACTS = {"dtype": "torch.bfloat16", "sizes": {"tensor_parallel_size": 2}, "hf_config": {"hidden_size": 64, "x": None}}


def test_the_fingerprint_is_pinned() -> None:
    assert build_fingerprint(FACTS) == "0f8ca3a9ccbff39ac11bd334ae54d93e"


def test_the_order_of_facts_does_not_matter() -> None:
    assert build_fingerprint(dict(reversed(FACTS.items()))) == build_fingerprint(FACTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "torch.float16"},
        {"sizes": {"tensor_parallel_size": 4}},
        {"hf_config": {"hidden_size": 64, "x": 0}},
        {"hf_config": {"hidden_size": 64}},
        {"more": 1},
    ],
)
def test_every_fact_moves_the_fingerprint(changed: dict[str, object]) -> None:
    assert build_fingerprint({**FACTS, **changed}) != build_fingerprint(FACTS)


RANK_0 = WorkerIdentity("kv_both", 0, 0)


@pytest.mark.parametrize(
    ("separator", "first", "second"),
    [
        ("-", ("qwen-7b", "chat-prod", RANK_0), ("qwen-7b-chat", "prod", RANK_0)),
        ("$", ("x$s", "t", RANK_0), ("x", "s$t", RANK_0)),
        ("1", ("m", "s", WorkerIdentity("kv_both", 1, 11)), ("m", "s", WorkerIdentity("kv_both", 11, 1))),
    ],
)
def test_workers_with_one_key_and_other_parts_have_other_fingerprints(
    separator: str, first: tuple[str, str, WorkerIdentity], second: tuple[str, str, WorkerIdentity]
) -> None:
    """Names and ranks are facts by themselves: the key's text is ambiguous where a part contains the separator."""
    assert build_seed_key(*first, separator=separator) == build_seed_key(*second, separator=separator)
    prints = {build_fingerprint({**FACTS, **seed_key_parts(*each)}) for each in (first, second)}
    assert len(prints) == 2


def test_what_is_not_plain_data_is_refused() -> None:
    with pytest.raises(TypeError):
        build_fingerprint({"object": object()})
