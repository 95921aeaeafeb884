"""Mooncake's endpoint, its lanes, and the spans that it registers."""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Any

import msgspec
import pytest

from vllm_rfork.engines.mooncake import endpoint as endpoints
from vllm_rfork.engines.mooncake.endpoint import Endpoint, decode, encode, obstacle, session_address
from vllm_rfork.engines.mooncake.spans import MAX_SPANS, Spans
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region

PAGE = 4096
OWN_BOOT = "this machine's"
ENDPOINT = Endpoint(
    session="192.0.2.7:15432",
    protocol="tcp",
    memory="cpu",
    boot=OWN_BOOT,
    identity=b"0123456789abcdef",
    identity_at=PAGE,
    regions=[(2 * PAGE, 100), (3 * PAGE, 50)],
)


@pytest.fixture(autouse=True)
def _no_rdma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(endpoints.FORCE_TCP, raising=False)
    monkeypatch.setattr(endpoints, "rdma_obstacle", lambda: "there is no RDMA device")
    monkeypatch.setattr(endpoints.host, "boot_id_if_known", lambda: OWN_BOOT)


def changed(**fields: Any) -> Endpoint:
    return msgspec.structs.replace(ENDPOINT, **fields)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_an_endpoint_survives_its_text() -> None:
    assert msgspec.structs.replace(decode(encode(ENDPOINT)), checksum="") == ENDPOINT


@pytest.mark.parametrize(
    "fields",
    [
        {"session": "192.0.2.7"},
        {"session": "192.0.2.7:0"},
        {"session": "192.0.2.7:70000"},
        {"session": "192.0.2.7:" + "9" * 5000},
        {"session": "seed.example:15000"},
        {"session": "0.0.0.0:15000"},
        {"session": "224.0.0.1:15000"},
        {"session": "[::1]:15000"},
        {"protocol": "smoke signals"},
        {"boot": "x" * 65},
        {"identity": b"short"},
        {"identity_at": 0},
        {"identity_at": 1 << 63},
        {"regions": [(PAGE, 0)]},
        {"regions": [(-PAGE, 1)]},
        {"regions": [(PAGE, 2), (PAGE + 1, 2)]},
        {"regions": [(2 * PAGE, 1), (PAGE, 1)]},
        {"regions": [(1 << 63, 1)]},
        {"v": 2},
    ],
)
def test_an_impossible_endpoint_is_the_seeds_failure(fields: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        decode(encode(changed(**fields)))
    assert (caught.value.operation, caught.value.side) == ("connect", "seed")
    assert caught.value.retry_elsewhere


@pytest.mark.parametrize(
    "text", ["", "[]", "nonsense", "\ud800", "[" * 100_000, "x" * (endpoints.MAX_ENDPOINT_LENGTH + 1)]
)
def test_what_is_no_endpoint_is_the_seeds_failure(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        decode(text)
    assert caught.value.side == "seed"
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("field", "value"), [("session", "192.0.2.8:15432"), ("identity_at", 2 * PAGE), ("regions", []), ("checksum", "")]
)
def test_a_damaged_endpoint_is_noticed(field: str, value: Any) -> None:
    fields = json.loads(encode(ENDPOINT))
    with pytest.raises(EngineError, match="checksum"):
        decode(json.dumps({**fields, field: value}))


def test_a_field_of_a_later_version_is_ignored() -> None:
    assert decode(json.dumps({**json.loads(encode(ENDPOINT)), "later": 1})).session == ENDPOINT.session


def test_a_session_is_one_hosts_address_and_port() -> None:
    assert session_address("127.0.0.1:1") == ipaddress.IPv4Address("127.0.0.1")
    assert session_address("127.0.0.1:²") is None


# -- the lane ----------------------------------------------------------------------------------------------------------


def test_equal_protocols_have_a_lane() -> None:
    assert obstacle(ENDPOINT, "cpu") is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"memory": "cuda"}, "the seed has cuda memory, this process cpu"),
        ({"protocol": "rdma"}, r"uses rdma and this process tcp \(there is no RDMA device\).* MC_FORCE_TCP=1 for both"),
        ({"session": "127.0.0.1:15000", "boot": "another"}, "rfork_seed_advertise_host"),
    ],
)
def test_an_obstacle_names_the_reason_and_the_remedy(fields: dict[str, Any], reason: str) -> None:
    assert re.search(reason, obstacle(changed(**fields), "cpu") or "")


def test_rdma_is_used_where_both_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "rdma_obstacle", lambda: None)
    monkeypatch.setattr(endpoints, "with_efa", lambda: False)
    assert endpoints.own_protocol("cpu") == "rdma"
    assert obstacle(changed(protocol="rdma"), "cpu") is None
    assert "give both RDMA" in (obstacle(ENDPOINT, "cpu") or "")
    monkeypatch.setattr(endpoints, "with_efa", lambda: True)
    assert endpoints.own_protocol("cuda") == "efa"
    monkeypatch.setenv(endpoints.FORCE_TCP, "1")
    assert endpoints.own_protocol("cuda") == "tcp"
    assert endpoints.own_protocol("npu") == "ascend"


# -- spans -------------------------------------------------------------------------------------------------------------


def spans_of(*regions: tuple[int, int], merge: bool = True) -> list[tuple[int, int]]:
    return [(span.address, span.nbytes) for span in Spans().new([Region(*each) for each in regions], merge=merge)]


def test_regions_with_no_whole_page_between_them_are_one_span() -> None:
    assert spans_of((PAGE, 10), (PAGE + 20, 10), (3 * PAGE - 1, 1)) == [(PAGE, 2 * PAGE)]
    assert spans_of((PAGE, 10), (3 * PAGE, 10)) == [(PAGE, 10), (3 * PAGE, 10)]
    assert spans_of((PAGE, PAGE), (2 * PAGE + 64, PAGE)) == [(PAGE, 2 * PAGE + 64)]


def test_64_thousand_tensors_of_a_heap_are_one_span() -> None:
    assert spans_of(*[(PAGE + i * 1024, 1000) for i in reversed(range(64_000))]) == [(PAGE, 64_000 * 1024 - 24)]


def test_device_memory_is_registered_as_it_is() -> None:
    assert spans_of((PAGE, 10), (PAGE + 20, 10), merge=False) == [(PAGE, 10), (PAGE + 20, 10)]


def test_what_a_span_contains_already_is_not_registered_again() -> None:
    spans = Spans()
    spans.add(spans.new([Region(PAGE, 10), Region(PAGE + 90, 10)], merge=True))
    assert spans.new([Region(PAGE + 20, 10)], merge=True) == []


def test_a_span_never_grows_over_an_earlier_one() -> None:
    spans = Spans()
    spans.add(spans.new([Region(PAGE + 100, 10)], merge=True))
    new = spans.new(
        [Region(PAGE, 10), Region(PAGE + 50, 10), Region(PAGE + 200, 10), Region(PAGE + 300, 10)], merge=True
    )
    assert new == [Region(PAGE, 60), Region(PAGE + 200, 110)]


def test_more_blocks_than_mooncake_describes_are_refused_with_the_number() -> None:
    spans = Spans()
    spans.add(spans.new([Region(PAGE, 1)], merge=True))
    many = [Region((2 + i) * 2 * PAGE, 1) for i in range(MAX_SPANS)]
    with pytest.raises(EngineError, match=f"{MAX_SPANS + 1} separate blocks.*at most {MAX_SPANS}") as caught:
        spans.new(many, merge=True)
    assert caught.value.operation == "register"
    assert len(spans.new(many[1:], merge=True)) == MAX_SPANS - 1
