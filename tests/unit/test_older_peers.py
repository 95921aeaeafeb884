"""Manifests between this version and those that offered one engine.

``recorded/manifest_of_one_engine.json`` is a manifest of commit 039f749, cut to some tensors and without the endpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_rfork.engines.registry import AUTO_ORDER, DEFAULT_ENGINE, engine_order
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest
from vllm_rfork.manifest.pairing import pair
from vllm_rfork.manifest.schema import EngineEndpoint

RECORDED = (Path(__file__).parent / "recorded" / "manifest_of_one_engine.json").read_bytes()


def test_a_seed_that_offers_one_engine_is_read() -> None:
    old = decode_manifest(RECORDED)
    assert old.endpoints == (EngineEndpoint("nixl", "text for the engine"),)
    assert sum(segment.nbytes for segment in pair(old, old)) == old.nbytes > 0


def test_what_is_written_differs_by_the_additional_endpoints_alone() -> None:
    """Older receivers ignore the field; every other byte is as their own seeds write it."""
    old = decode_manifest(RECORDED)
    several = msgspec.structs.replace(old, more_endpoints=(EngineEndpoint("collective", "other text"),))
    written: dict[str, Any] = json.loads(encode_manifest(several))
    assert written.pop("more_endpoints") == [{"engine": "collective", "endpoint": "other text"}]
    assert json.dumps(written, separators=(",", ":")).encode() == RECORDED


@pytest.mark.parametrize(("device", "engine"), [("npu", "yuanrong"), ("cuda", "nixl"), ("cpu", "nixl")])
def test_the_engine_of_older_workers_stays_in_fingerprints_and_first_in_manifests(device: str, engine: str) -> None:
    """Older workers select it with ``auto``: with another one here, no old and new worker would pair."""
    assert DEFAULT_ENGINE[device] == engine
    assert engine in AUTO_ORDER[device]
    assert engine in engine_order("auto", device)
