"""A decoded body is a consistent manifest, or a SeedError."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rfork.errors import SeedError
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest, validate_manifest
from vllm_rfork.manifest.schema import MANIFEST_VERSION, EngineEndpoint, Manifest, Region, Span, TensorEntry

GOOD = Manifest(
    seed_key="/models/q$prod$kv_both$0$0",
    fingerprint="f" * 64,
    epoch="e1",
    layout="checkpoint",
    engine="memory",
    endpoint="memory:1:2:3:4",
    regions=(Region(4096, 1000), Region(5096, 1000)),
    spans=(Span(0, 4096, 1000, "aa"), Span(1, 5100, 10, "bb")),
    tensors=(
        TensorEntry("a", "bfloat16", (500,), (1,), 0),
        TensorEntry("a_alias", "bfloat16", (10, 10), (10, 1), 0, offset=998),
        TensorEntry("b", "uint8", (10,), (1,), 1),
        TensorEntry("nothing", "uint8", (0,), (1,), -1),
    ),
    state={"layers.0.attn._k_scale_float": 0.5},
)


def altered(**fields: Any) -> Manifest:
    return msgspec.structs.replace(GOOD, **fields)


def test_a_good_manifest_survives_the_wire() -> None:
    assert decode_manifest(encode_manifest(GOOD)) == GOOD
    assert GOOD.nbytes == 1010


MORE = (EngineEndpoint("nixl", "{}"), EngineEndpoint("collective", "tcp://10.0.0.1:5000"))

#: As seeds wrote it before they offered several engines.
OLD_FORM = b"""{"version": 1, "seed_key": "k", "fingerprint": "f", "epoch": "e1", "layout": "checkpoint",
"engine": "nixl", "endpoint": "opaque", "built": null, "digest_algorithm": "", "checkpoint": null,
"regions": [{"address": 4096, "nbytes": 1000}],
"spans": [{"region": 0, "address": 4096, "nbytes": 1000, "digest": ""}],
"tensors": [{"name": "a", "dtype": "uint8", "shape": [1000], "stride": [1], "span": 0}],
"state": {}, "state_gone": []}"""


def test_a_manifest_of_one_engine_has_one_endpoint() -> None:
    old = decode_manifest(OLD_FORM)
    assert old.endpoints == (EngineEndpoint("nixl", "opaque"),)
    assert (old.version, old.more_endpoints) == (MANIFEST_VERSION, ())


def test_a_manifest_carries_the_endpoints_of_several_engines_in_the_seeds_order() -> None:
    sent = altered(more_endpoints=MORE)
    received = decode_manifest(encode_manifest(sent))
    assert received == sent
    assert [each.engine for each in received.endpoints] == ["memory", "nixl", "collective"]
    assert received.header.more_endpoints == MORE
    assert sent.header.manifest(regions=(), spans=(), tensors=()).endpoints == sent.endpoints


def test_an_older_receiver_reads_the_one_endpoint_that_it_looks_for() -> None:
    """Its classes have no field for the others and ignore it."""

    class OldManifest(msgspec.Struct, frozen=True, kw_only=True):
        version: int
        seed_key: str
        engine: str
        endpoint: str
        regions: tuple[Region, ...]

    read = msgspec.json.decode(encode_manifest(altered(more_endpoints=MORE)), type=OldManifest)
    assert (read.version, read.engine, read.endpoint) == (1, "memory", "memory:1:2:3:4")


CONTRADICTIONS = {
    "two endpoints of the engine older receivers look for": altered(more_endpoints=(EngineEndpoint("memory", "b"),)),
    "two endpoints of one engine": altered(more_endpoints=(*MORE, MORE[0])),
    "an engine without a name": altered(more_endpoints=(EngineEndpoint("", "b"),)),
    "an engine's name of 65 characters": altered(more_endpoints=(EngineEndpoint("e" * 65, "b"),)),
    "seventeen engines": altered(more_endpoints=tuple(EngineEndpoint(f"e{number}", "") for number in range(16))),
    "version from the future": altered(version=MANIFEST_VERSION + 1),
    "version 0": altered(version=0),
    "region without bytes": altered(regions=(Region(4096, 0), Region(5096, 1000))),
    "region at 0": altered(regions=(Region(0, 1000), Region(5096, 1000))),
    "negative region": altered(regions=(Region(4096, -1), Region(5096, 1000))),
    "region beyond the address space": altered(regions=(Region(4096, 1000), Region((1 << 63) - 10, 1000))),
    "overlapping regions": altered(regions=(Region(4096, 1001), Region(5096, 1000))),
    "the same region twice": altered(regions=(Region(4096, 1000), Region(4096, 1000))),
    "span in a region that is not there": altered(spans=(Span(0, 4096, 1000), Span(2, 5100, 10))),
    "span in region -1": altered(spans=(Span(0, 4096, 1000), Span(-1, 5100, 10))),
    "span before its region": altered(spans=(Span(0, 4095, 10), Span(1, 5100, 10))),
    "span beyond its region": altered(spans=(Span(0, 4096, 1001), Span(1, 5100, 10))),
    "span in the wrong region": altered(spans=(Span(1, 4096, 1000), Span(1, 5100, 10))),
    "span without bytes": altered(spans=(Span(0, 4096, 0),), tensors=()),
    "span of negative length": altered(spans=(Span(0, 4100, -4),), tensors=()),
    "tensor twice": altered(tensors=(GOOD.tensors[0], GOOD.tensors[0])),
    "shape and stride of other ranks": altered(tensors=(TensorEntry("a", "uint8", (1, 2), (1,), 0),)),
    "negative size": altered(tensors=(TensorEntry("a", "uint8", (-1,), (1,), 0),)),
    "tensor in a span that is not there": altered(tensors=(TensorEntry("a", "uint8", (1,), (1,), 2),)),
    "tensor in span -2": altered(tensors=(TensorEntry("a", "uint8", (1,), (1,), -2),)),
    "tensor that starts behind its span": altered(tensors=(TensorEntry("a", "uint8", (1,), (1,), 1, offset=10),)),
    "negative offset": altered(tensors=(TensorEntry("a", "uint8", (1,), (1,), 1, offset=-1),)),
}


@pytest.mark.parametrize("manifest", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_contradictions_are_refused(manifest: Manifest) -> None:
    with pytest.raises(SeedError):
        validate_manifest(manifest)
    with pytest.raises(SeedError):
        decode_manifest(encode_manifest(manifest))


def test_the_error_lets_another_seed_be_tried() -> None:
    with pytest.raises(SeedError) as caught:
        decode_manifest(b"{}")
    assert caught.value.retry_elsewhere


def outcome(body: bytes) -> None:
    """Decodes, or raises SeedError; anything else fails the test."""
    with contextlib.suppress(SeedError):
        validate_manifest(decode_manifest(body))


@given(st.binary(max_size=300))
def test_bytes_never_raise_anything_else(body: bytes) -> None:
    outcome(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.data())
def test_a_manifest_with_any_value_anywhere_never_raises_anything_else(data: st.DataObject) -> None:
    plain: Any = json.loads(encode_manifest(GOOD))
    where: Any = plain
    while True:
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else list(range(len(where)))))
        inner = where[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.booleans()):
            break
        where = inner
    where[key] = data.draw(json_values)
    outcome(json.dumps(plain).encode())


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"[" * 100_000, b'{"version": 1e400}', b'{"a":' * 50_000, b"\xff\xfe", b'{"version": 1}'],
)
def test_known_ways_to_be_no_manifest(body: bytes) -> None:
    with pytest.raises(SeedError):
        decode_manifest(body)


def test_addresses_that_no_machine_has_are_refused() -> None:
    for address in (1 << 63, 1 << 64, 1 << 70, -1):
        with pytest.raises(SeedError):
            decode_manifest(encode_manifest(GOOD).replace(b'"address":4096', b'"address":%d' % address))
