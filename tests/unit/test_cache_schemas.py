"""JSON caches from a seed: what is used, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from vllm_rfork.caches.safe import autotune_table, parsing
from vllm_rfork.caches.safe.autotune_table import checked_table
from vllm_rfork.caches.safe.model_info import FieldKind, checked_model_info
from vllm_rfork.caches.safe.startup_plan import (
    RESERVE_NBYTES,
    CarriedPlan,
    DeviceMemory,
    capped,
    decode_plan,
    encode_plan,
    fit_obstacle,
)
from vllm_rfork.errors import CacheError
from vllm_rfork.vllm_compat.startup_plan_file import parse_plan_file, plan_file

GB = 10**9
MEMORY = DeviceMemory(total_nbytes=150 * GB, free_nbytes=149 * GB, requested_nbytes=75 * GB, weights_nbytes=15 * GB)
PLAN = CarriedPlan(55 * GB, GB, MEMORY, {"gpu_memory_utilization": "0.5"})
FINGERPRINT = "0123456789abcdef"


def plan(**changes: Any) -> CarriedPlan:
    memory = msgspec.structs.replace(MEMORY, **{key: changes.pop(key) for key in list(changes) if hasattr(MEMORY, key)})
    return msgspec.structs.replace(PLAN, memory=memory, **changes)


# --- the start-up plan ----------------------------------------------------------------------------------------------


def test_a_plan_of_an_equal_device_becomes_vllms_file() -> None:
    assert decode_plan(encode_plan(PLAN)) == PLAN
    assert json.loads(plan_file(PLAN, FINGERPRINT, MEMORY, PLAN.settings)) == {
        "schema": 1,
        "fingerprint": FINGERPRINT,
        "kv_cache_memory_bytes": 55 * GB,
        "free_memory_baseline": 149 * GB,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_nbytes": 0},
        {"cache_nbytes": -1},
        {"cache_nbytes": 2**62},
        {"cache_nbytes": 60 * GB},
        {"graphs_nbytes": -1},
        {"graphs_nbytes": 2**62},
        {"free_nbytes": 0},
        {"free_nbytes": 151 * GB},
        {"requested_nbytes": 151 * GB},
        {"weights_nbytes": 75 * GB},
        {"total_nbytes": 2**62},
    ],
)
def test_a_plan_with_absurd_numbers_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(CacheError, match="not possible"):
        decode_plan(encode_plan(plan(**changes)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"cache_nbytes":1.5,"graphs_nbytes":0,"memory":{},"settings":{}}',
        encode_plan(PLAN).replace(b'"graphs_nbytes":1000000000', b'"graphs_nbytes":NaN'),
        encode_plan(PLAN).replace(b'"graphs_nbytes":1000000000', b'"graphs_nbytes":true'),
        encode_plan(PLAN).replace(b'"0.5"', b"0.5"),
        b" " * 100_000,
        b"[" * 50_000,
    ],
)
def test_what_is_not_a_plan_is_refused(body: bytes) -> None:
    with pytest.raises(CacheError, match="start-up plan"):
        decode_plan(body)


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ({"total_nbytes": 80 * GB}, "the device has"),
        ({"requested_nbytes": 70 * GB}, "the part that may be used"),
        ({"weights_nbytes": 16 * GB}, "the model has"),
        ({"free_nbytes": 74 * GB}, "were free here"),
    ],
)
def test_a_plan_of_another_device_is_not_used(own: dict[str, int], text: str) -> None:
    here = msgspec.structs.replace(MEMORY, **own)
    assert text in str(fit_obstacle(PLAN, here, PLAN.settings))
    with pytest.raises(CacheError, match="does not fit"):
        plan_file(PLAN, FINGERPRINT, here, PLAN.settings)


def test_a_plan_with_other_settings_is_not_used() -> None:
    """Their names are no part of vLLM's own fingerprint of a plan."""
    assert fit_obstacle(PLAN, MEMORY, {"gpu_memory_utilization": "0.9"}) == (
        "gpu_memory_utilization is 0.9 here and 0.5 on the seed"
    )
    assert "limit_mm is not set here" in str(
        fit_obstacle(plan(settings={**PLAN.settings, "limit_mm": "8"}), MEMORY, PLAN.settings)
    )


def test_a_plan_that_would_exceed_or_waste_the_memory_is_not_used() -> None:
    beside = MEMORY.requested_nbytes - MEMORY.weights_nbytes
    assert "more than" in str(fit_obstacle(plan(cache_nbytes=beside - RESERVE_NBYTES + 1), MEMORY, PLAN.settings))
    assert fit_obstacle(plan(cache_nbytes=beside - RESERVE_NBYTES), MEMORY, PLAN.settings) is None
    assert fit_obstacle(plan(cache_nbytes=beside // 2), MEMORY, PLAN.settings) is None
    assert "less than half" in str(fit_obstacle(plan(cache_nbytes=beside // 2 - 1), MEMORY, PLAN.settings))


def test_a_little_less_free_memory_is_no_obstacle_and_vllm_accepts_the_plan() -> None:
    here = msgspec.structs.replace(MEMORY, free_nbytes=148 * GB)
    body = plan_file(PLAN, FINGERPRINT, here, PLAN.settings)
    assert parse_plan_file(body, FINGERPRINT).free_memory_baseline == 148 * GB


def test_weights_may_differ_by_what_the_allocator_adds() -> None:
    assert (
        fit_obstacle(PLAN, msgspec.structs.replace(MEMORY, weights_nbytes=MEMORY.weights_nbytes + 10**6), PLAN.settings)
        is None
    )


def test_more_memory_beside_the_cache_makes_the_cache_smaller() -> None:
    assert capped(PLAN, MEMORY, 17 * GB) == 55 * GB
    assert capped(PLAN, MEMORY, 20 * GB) == 75 * GB - 20 * GB - GB - RESERVE_NBYTES


def test_vllms_own_file_is_read_with_the_same_care() -> None:
    body = plan_file(PLAN, FINGERPRINT, MEMORY, PLAN.settings)
    assert parse_plan_file(body, FINGERPRINT).kv_cache_memory_bytes == 55 * GB
    with pytest.raises(CacheError, match="fingerprint"):
        parse_plan_file(body, "f" * 16)
    for before, after in ((b'"schema":1', b'"schema":2'), (b"55000000000", b"-5"), (b"149000000000", b"9e99")):
        with pytest.raises(CacheError, match="vLLM's start-up plan"):
            parse_plan_file(body.replace(before, after), FINGERPRINT)
    with pytest.raises(ValueError, match="not a fingerprint"):
        plan_file(PLAN, "../../x", MEMORY, PLAN.settings)


# --- FlashInfer's autotune table ------------------------------------------------------------------------------------

METADATA = {"flashinfer_version": "0.6.14", "gpu": "NVIDIA H200", "cuda_version": "13.0"}
KEY = "('trtllm::fused_moe', 'MoERunner', ((1, 64), (64, 64)), ())"
TABLE: dict[str, Any] = {"_metadata": METADATA, KEY: ["MoERunner", 5], "other": ["MoERunner", [128, [-1, 2], None]]}


def table(**changes: Any) -> bytes:
    return json.dumps({**TABLE, **changes}).encode()


def test_a_table_of_an_equal_environment_is_written_anew() -> None:
    assert json.loads(checked_table(table(), METADATA)) == TABLE


@pytest.mark.parametrize(
    "metadata",
    [None, {}, [], "*", {**METADATA, "gpu": "*"}, {**METADATA, "gpu": "NVIDIA H100"}, {**METADATA, "more": "x"}],
)
def test_a_table_of_another_environment_is_refused(metadata: Any) -> None:
    with pytest.raises(CacheError, match="environment"):
        checked_table(table(_metadata=metadata), METADATA)


def test_a_table_without_an_environment_is_refused() -> None:
    """FlashInfer itself would take it."""
    with pytest.raises(CacheError, match="environment"):
        checked_table(json.dumps({key: value for key, value in TABLE.items() if key != "_metadata"}).encode(), METADATA)


@pytest.mark.parametrize("own", [{}, {"gpu": ""}, {"gpu": "*"}])
def test_a_worker_that_does_not_know_its_environment_takes_no_table(own: dict[str, str]) -> None:
    with pytest.raises(CacheError, match="does not state"):
        checked_table(json.dumps({**TABLE, "_metadata": own}).encode(), own)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        5,
        [],
        ["MoERunner"],
        ["MoERunner", 1, 2],
        [1, 1],
        ["__import__('os')", 1],
        ["", 1],
        ["MoERunner", 2**31],
        ["MoERunner", -(2**40)],
        ["MoERunner", -2],
        ["MoERunner", True],
        ["MoERunner", 1.5],
        ["MoERunner", "text"],
        ["MoERunner", {"a": 1}],
        ["MoERunner", [[[[[[[1]]]]]]]],
        ["MoERunner", list(range(65))],
    ],
)
def test_an_unacceptable_entry_is_refused(entry: Any) -> None:
    with pytest.raises(CacheError, match="unacceptable"):
        checked_table(table(**{KEY: entry}), METADATA)


def test_an_unacceptable_key_is_refused() -> None:
    for key in ("x\0", "x" * 4097, "x\u202e"):
        with pytest.raises(CacheError, match="unacceptable key"):
            checked_table(table(**{key: ["MoERunner", 1]}), METADATA)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"_metadata":{}}', b'{"a":NaN}', b'{"a":' * 2_000])
def test_what_is_not_a_table_is_refused(body: bytes) -> None:
    with pytest.raises(CacheError, match="autotune table"):
        checked_table(body, METADATA)


def test_a_table_beyond_the_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="receivers read"):
        checked_table(b"[" * (parsing.MAX_CONTAINERS + 1), METADATA)
    monkeypatch.setattr(autotune_table, "MAX_ENTRIES", 1)
    with pytest.raises(CacheError, match="entries"):
        checked_table(table(), METADATA)


# --- model information ----------------------------------------------------------------------------------------------

HASH = "ab" * 32
FIELDS: dict[str, FieldKind] = {
    "architecture": "word",
    "supports_pp": "flag",
    "attn_type": frozenset({"decoder", "encoder"}),
    "methods": "words",
}
INFO = {"architecture": "Qwen2ForCausalLM", "supports_pp": True, "attn_type": "decoder", "methods": ["evs"]}


def info(**changes: Any) -> bytes:
    return json.dumps({"hash": HASH, "modelinfo": {**INFO, **changes}}).encode()


def test_information_about_an_equal_source_is_written_anew() -> None:
    assert json.loads(checked_model_info(info(), HASH, FIELDS)) == {"hash": HASH, "modelinfo": INFO}


def test_information_about_another_source_is_refused() -> None:
    with pytest.raises(CacheError, match="for source"):
        checked_model_info(info(), "cd" * 32, FIELDS)
    with pytest.raises(CacheError, match="for source"):
        checked_model_info(info().replace(HASH.encode(), b""), "", FIELDS)


@pytest.mark.parametrize(
    "changes",
    [
        {"supports_pp": 1},
        {"supports_pp": "true"},
        {"supports_pp": None},
        {"attn_type": "hybrid"},
        {"attn_type": ["decoder"]},
        {"architecture": "a\nb"},
        {"architecture": "x" * 129},
        {"methods": "evs"},
        {"methods": [1]},
        {"methods": ["x"] * 65},
    ],
)
def test_a_value_of_another_kind_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CacheError, match="unacceptable value"):
        checked_model_info(info(**changes), HASH, FIELDS)


def test_other_fields_than_this_vllms_are_refused() -> None:
    with pytest.raises(CacheError, match="other fields: later"):
        checked_model_info(info(later=True), HASH, FIELDS)
    with pytest.raises(CacheError, match="other fields: methods"):
        checked_model_info(
            json.dumps({"hash": HASH, "modelinfo": {**INFO}}).encode(),
            HASH,
            {name: kind for name, kind in FIELDS.items() if name != "methods"},
        )
    with pytest.raises(CacheError, match="cannot be read"):
        checked_model_info(info().replace(b'"hash"', b'"more":1,"hash"'), HASH, FIELDS)
