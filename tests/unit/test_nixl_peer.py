"""Which lane two NIXL agents get, decided from what their endpoints say."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.nixl import agent
from vllm_rfork.engines.nixl.engine import NixlEngine
from vllm_rfork.engines.nixl.peer import (
    IDENTITY_NBYTES,
    Endpoint,
    Lane,
    decode_endpoint,
    encode_endpoint,
    lane,
    pid_namespace,
    tcp_allowed,
    this_process,
)
from vllm_rfork.errors import EngineError


def metadata_of_nixl(address: int) -> bytes:
    """Metadata with one registration, of the page at ``address``."""

    def field(tag: bytes, value: bytes) -> bytes:
        return tag + struct.pack("<Q", len(value)) + value + b"|"

    one = struct.pack("<Q", 1)
    return b"".join(
        [
            b"nixlSerDes|",
            field(b"Agent", b"rfork-test"),
            field(b"Conns", one) + field(b"t", b"UCX") + field(b"c", b"\x20\xff"),
            field(b"", b"MemSection"),
            field(b"nixlSecElms", one),
            field(b"bknd", b"UCX") + field(b"nixlDList", b"nixlSDList") + field(b"t", bytes(4)) + field(b"n", one),
            field(b"", struct.pack("<QQQ", address, IDENTITY_NBYTES, 0) + bytes(11)),
        ]
    )


IDENTITY = bytes(range(IDENTITY_NBYTES))
PAGE = ctypes.create_string_buffer(IDENTITY, IDENTITY_NBYTES)
HERE = Endpoint(
    memory="DRAM",
    device=0,
    boot="this-boot",
    pid=os.getpid(),
    uid=os.getuid(),
    pid_namespace=4026531836,
    identity=IDENTITY,
    identity_at=ctypes.addressof(PAGE),
    rdma=False,
    allow_tcp=False,
    metadata=metadata_of_nixl(ctypes.addressof(PAGE)),
)


def changed(**fields: Any) -> Endpoint:
    return msgspec.structs.replace(HERE, **fields)


def test_one_machine_one_user_one_namespace_is_attach() -> None:
    assert lane(HERE, HERE) == (Lane.CMA, "")


def test_one_machine_with_cuda_memory_is_cuda_ipc() -> None:
    cuda = changed(memory="VRAM")
    assert lane(cuda, cuda) == (Lane.CUDA, "")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"pid_namespace": 1}, "pid namespace"),
        ({"uid": HERE.uid + 1}, "another user"),
        ({"identity_at": 1 << 40}, "cannot be attached"),
        ({"boot": "other-boot"}, "another machine"),
    ],
)
def test_what_keeps_attach_away_is_named(fields: dict[str, Any], why: str) -> None:
    chosen, reason = lane(HERE, changed(**fields))
    assert chosen is Lane.EMULATED
    assert why in reason


def test_unknown_facts_are_not_taken_for_equal_ones() -> None:
    """A machine that hides its boot id or its namespaces may be another one."""
    for field, unknown in (("boot", ""), ("pid_namespace", 0)):
        other = changed(**{field: unknown})
        assert lane(other, other)[0] is Lane.EMULATED


@pytest.mark.parametrize(("mine", "theirs"), [(True, True), (True, False), (False, True), (False, False)])
def test_between_machines_both_need_rdma(mine: bool, theirs: bool) -> None:
    chosen, why = lane(changed(rdma=mine), changed(boot="other-boot", rdma=theirs))
    assert (chosen is Lane.RDMA) is (mine and theirs)
    assert ("RDMA" in why) is not (mine and theirs)


APART = [{"pid_namespace": 1}, {"uid": HERE.uid + 1}, {"identity_at": 1 << 40}]


@pytest.mark.parametrize("memory", ["DRAM", "VRAM"])
@pytest.mark.parametrize("fields", APART, ids=lambda fields: next(iter(fields)))
def test_two_pods_of_one_node_have_rdma_if_both_do(memory: str, fields: dict[str, Any]) -> None:
    """In another pid namespace UCX takes TCP even between GPUs of one host, so that lane is never CUDA IPC."""
    own = changed(memory=memory, rdma=True)
    assert lane(own, changed(memory=memory, rdma=True, **fields)) == (Lane.RDMA, "")
    chosen, why = lane(own, changed(memory=memory, **fields))
    assert chosen is Lane.EMULATED
    assert "and the seed has no RDMA device" in why
    chosen, why = lane(changed(memory=memory), changed(memory=memory, rdma=True, **fields))
    assert chosen is Lane.EMULATED
    assert "and this process has no RDMA device" in why


@pytest.mark.parametrize("fields", [{}, *APART], ids=str)
def test_one_gpu_is_refused_before_ucx_fails_in_a_read(fields: dict[str, Any]) -> None:
    own = changed(memory="VRAM", rdma=True, gpu="ab" * 16)
    with pytest.raises(EngineError, match=r"same GPU.*cuda_ipc") as caught:
        lane(own, changed(memory="VRAM", rdma=True, gpu="ab" * 16, **fields))
    assert caught.value.code == "lane"
    for other in ("", "cd" * 16):  # of an older seed, or another GPU
        assert lane(own, changed(memory="VRAM", rdma=True, gpu=other))[0] is Lane.CUDA


def test_attach_comes_before_rdma() -> None:
    assert lane(changed(rdma=True), changed(rdma=True))[0] is Lane.CMA
    cuda = changed(memory="VRAM", rdma=True)
    assert lane(cuda, cuda)[0] is Lane.CUDA


def test_rdma_does_not_hide_that_the_seed_has_closed() -> None:
    with pytest.raises(EngineError, match="closed"):
        lane(changed(rdma=True), changed(rdma=True, identity=bytes(IDENTITY_NBYTES)))


# --- the obstacle, before an agent is opened -------------------------------------------------------------------------


@pytest.fixture
def own() -> Endpoint:
    """A closed seed's facts, on this machine: this process itself."""
    return msgspec.structs.replace(
        this_process("cpu", allow_tcp=False), identity=IDENTITY, identity_at=ctypes.addressof(PAGE)
    )


def obstacle(peer: Endpoint, device: str = "cpu", **options: str) -> str | None:
    return NixlEngine.lane_obstacle(encode_endpoint(peer), EngineConfig(device=device, options=options))


def test_a_lane_that_may_exist_has_no_obstacle(own: Endpoint) -> None:
    assert obstacle(own) is None
    elsewhere = msgspec.structs.replace(own, boot="other", allow_tcp=True)
    assert obstacle(elsewhere, RFORK_NIXL_ALLOW_TCP="1") is None


def test_an_obstacle_is_named_without_opening_an_agent(own: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "MODULES", ())
    for fields, why in (
        ({"boot": "other"}, "another machine"),
        ({"uid": own.uid + 1}, "another user"),
        ({"memory": "VRAM"}, "holds VRAM"),
    ):
        assert why in str(obstacle(msgspec.structs.replace(own, **fields))), fields
    for fields, why in (({"identity": bytes(IDENTITY_NBYTES)}, "has closed"), ({"pid": (1 << 22) - 1}, "is gone")):
        with pytest.raises(EngineError, match=why) as caught:
            obstacle(msgspec.structs.replace(own, **fields))
        assert caught.value.side == "seed"
    assert "cannot read the memory of npu:0" in str(obstacle(own, device="npu:0"))


@given(st.text(max_size=200))
def test_any_unreadable_endpoint_is_the_seeds_failure(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        NixlEngine.lane_obstacle(text, EngineConfig(device="cpu"))
    assert (caught.value.side, caught.value.retry_elsewhere) == ("seed", True)


def test_other_memory_is_refused() -> None:
    with pytest.raises(EngineError, match="VRAM"):
        lane(HERE, changed(memory="VRAM"))


def test_a_closed_or_reused_process_is_no_seed() -> None:
    with pytest.raises(EngineError, match="closed") as caught:
        lane(HERE, changed(identity=bytes(IDENTITY_NBYTES)))
    assert caught.value.retry_elsewhere
    with pytest.raises(EngineError, match="gone"):
        lane(HERE, changed(pid=(1 << 22) - 1))


def test_endpoints_survive_the_wire() -> None:
    assert msgspec.structs.replace(decode_endpoint(encode_endpoint(HERE)), checksum="") == HERE
    assert pid_namespace() > 0


@given(st.text(max_size=200))
def test_any_text_is_an_endpoint_or_an_engine_error(text: str) -> None:
    with pytest.raises(EngineError):
        decode_endpoint(text)


@given(st.sampled_from(sorted(HERE.__struct_fields__)), st.none() | st.integers() | st.text(max_size=9) | st.booleans())
def test_any_value_in_any_field_is_an_endpoint_or_an_engine_error(field: str, value: Any) -> None:
    with contextlib.suppress(EngineError):
        endpoint = decode_endpoint(json.dumps({**json.loads(encode_endpoint(HERE)), "checksum": "", field: value}))
        assert endpoint.pid > 0
        assert endpoint.identity_at > 0
        assert len(endpoint.identity) == IDENTITY_NBYTES


def test_the_opt_in_comes_from_options_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RFORK_NIXL_ALLOW_TCP", raising=False)
    assert not tcp_allowed({})
    assert tcp_allowed({"RFORK_NIXL_ALLOW_TCP": "1"})
    monkeypatch.setenv("RFORK_NIXL_ALLOW_TCP", "true")
    assert tcp_allowed({})
    assert not tcp_allowed({"RFORK_NIXL_ALLOW_TCP": "0"}), "options win"
