"""What receivers of the installed base get to read, generation by generation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_rfork.manifest.legacy import Generation, InstalledBase, info_payload, shape_payload
from vllm_rfork.manifest.schema import Manifest, Region, Span, TensorEntry


def manifest(*tensors: TensorEntry) -> Manifest:
    return Manifest(
        seed_key="k",
        fingerprint="f",
        epoch="e",
        layout="runtime",
        engine="yuanrong",
        endpoint="10.0.0.1:7000",
        regions=(Region(4096, 4096),),
        spans=(Span(0, 4096, 1024), Span(0, 8192 - 1024, 1024)),
        tensors=tensors,
    )


def entry(name: str = "w", **changes: Any) -> TensorEntry:
    fields: dict[str, Any] = {"dtype": "bfloat16", "shape": (2, 3), "stride": (3, 1), "span": 0, **changes}
    return TensorEntry(name, **fields)


def offered(*tensors: TensorEntry, generation: Generation = Generation.PLAIN) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(
        info_payload(InstalledBase.from_manifest(manifest(*tensors), "10.0.0.1:7000", generation))
    )
    return payload


def test_plain_entries_are_what_018_unpacks_and_carry_no_promise_of_another_form() -> None:
    payload = offered(entry("a"), entry("b", span=1, offset=16, dtype="float32", shape=(4,), stride=(1,)))
    assert payload == {
        "rfork_transfer_engine_info": ["10.0.0.1:7000", {"a": [4096, 6, 2], "b": [8192 - 1024 + 16, 4, 4]}]
    }


def test_typed_entries_are_what_029_checks() -> None:
    payload = offered(entry("a", format=29), generation=Generation.TYPED)
    assert payload == {
        "rfork_transfer_engine_info": ["10.0.0.1:7000", {"a": [4096, 6, 2, [2, 3], "bfloat16"]}],
        "rfork_protocol_version": 1,
        "rfork_transfer_engine_format_info": {"a": 29},
    }


def test_shapes_have_a_call_of_their_own() -> None:
    base = InstalledBase.from_manifest(manifest(entry("a")), "h:1")
    assert json.loads(shape_payload(base)) == {"rfork_transfer_engine_shape_info": {"a": [2, 3]}}


def test_nothing_to_offer_is_a_null_payload_that_every_generation_takes_for_no() -> None:
    assert json.loads(info_payload(None)) == {"rfork_transfer_engine_info": None}
    assert json.loads(shape_payload(None)) == {"rfork_transfer_engine_shape_info": None}


@pytest.mark.parametrize(
    "untold",
    [
        entry("gap", shape=(2, 3), stride=(4, 1)),
        entry("broadcast", shape=(2, 3), stride=(0, 1)),
        entry("every second", shape=(4,), stride=(2,)),
        entry("unknown dtype", dtype="float4_e2m1fn_x2"),
        entry("empty", shape=(0,), stride=(1,), span=-1),
    ],
    ids=lambda tensor: tensor.name,
)
def test_a_tensor_that_is_no_gapless_run_of_elements_is_not_told(untold: TensorEntry) -> None:
    payload = offered(entry("a"), untold)
    assert list(payload["rfork_transfer_engine_info"][1]) == ["a"]


@pytest.mark.parametrize(("shape", "stride"), [((2, 3), (1, 2)), ((3, 1), (1, 7)), ((), ()), ((2, 3, 4), (3, 1, 6))])
def test_a_permuted_but_gapless_tensor_is_told(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    payload = offered(entry("a", shape=shape, stride=stride))
    assert "a" in payload["rfork_transfer_engine_info"][1]
