"""The adapter of the collective engine and its receiving side."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Sequence
from typing import ClassVar

import msgspec
import pytest

from tests.recorded_groups import (
    SECRET,
    Backends,
    soon,
)
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.collective import engine, messages, receiver
from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.endpoint import Endpoint, decode, encode
from vllm_rfork.engines.collective.engine import CollectiveEngine
from vllm_rfork.engines.collective.group import RECEIVER, Backend, Group, GroupFailed
from vllm_rfork.engines.collective.messages import Read, Sending
from vllm_rfork.engines.collective.plan import Piece
from vllm_rfork.engines.collective.receiver import Peer
from vllm_rfork.engines.collective.sender import MAX_STRANGERS
from vllm_rfork.engines.collective.tcp import TcpBackend
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.segments import Segment


def test_a_long_bound_of_the_receivers_does_not_end_the_lane() -> None:
    serving, receiving = CollectiveEngine(), CollectiveEngine()
    serving.open(EngineConfig("cpu"))
    receiving.open(EngineConfig("cpu"))
    try:
        receiving.connect(serving.endpoint, 7200.0)
    finally:
        receiving.close()
        serving.close()


def test_strangers_do_not_keep_receivers_out() -> None:
    serving, receiving = CollectiveEngine(), CollectiveEngine()
    serving.open(EngineConfig("cpu"))
    receiving.open(EngineConfig("cpu"))
    assert serving._sender is not None
    strangers = [socket.create_connection(("127.0.0.1", serving._sender.port)) for _ in range(3 * MAX_STRANGERS)]
    time.sleep(0.3)
    try:
        receiving.connect(serving.endpoint, 10.0)
    finally:
        for each in strangers:
            each.close()
        receiving.close()
        serving.close()


class Stuck(Group):
    """A group whose receive is in flight, and whose close then fails for another reason."""

    def send(self, pieces: Sequence[Piece], deadline: float) -> None: ...

    def receive(self, pieces: Sequence[Piece], deadline: float) -> None:
        raise GroupFailed("the library does not end a group", in_flight=True)

    def abort(self) -> None: ...

    def close(self) -> None:
        raise GroupFailed("cuCtxPushCurrent_v2 failed")


def test_in_flight_is_not_taken_back_by_a_close_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer.__new__(Peer)

    class Control:
        def close(self) -> None: ...

    peer._channel, peer._group = Control(), Stuck()  # type: ignore[assignment]
    monkeypatch.setattr(messages, "send", lambda *_: None)
    monkeypatch.setattr(messages, "receive", lambda *_: None)
    with pytest.raises(EngineError) as caught:
        peer.read([Segment(1, 1, 1)], soon())
    assert caught.value.in_flight


class Silent(Group):
    """A group whose bytes have arrived."""

    def send(self, pieces: Sequence[Piece], deadline: float) -> None: ...

    def receive(self, pieces: Sequence[Piece], deadline: float) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("answers", [0, 1])
def test_a_seed_that_stops_between_two_batches_is_noticed_before_the_reads_deadline(
    answers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection stays open. Nothing of a group is waited for: only the messages around it have not come."""
    monkeypatch.setattr(messages, "MESSAGE_S", 0.2)
    monkeypatch.setattr(receiver, "_ANSWER_S", 0.1)
    keys = secrets.token_bytes(32), secrets.token_bytes(32)
    one, other = socket.socketpair()
    seed = Channel(other, *reversed(keys))
    for _ in range(answers):
        messages.send(seed, Sending(), soon())
    peer = Peer.__new__(Peer)
    peer._channel, peer._group = Channel(one, *keys), Silent()
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        peer.read([Segment(1, 1, 1)], soon(10.0))
    assert caught.value.code == "timeout"
    assert time.monotonic() - began < 5.0
    assert not peer.usable
    assert messages.receive(seed, Read, soon()).timeout_s < 1.0
    seed.close()


def test_whatever_fails_while_a_group_is_created_is_an_engine_error(monkeypatch: pytest.MonkeyPatch) -> None:
    serving, receiving = CollectiveEngine(), CollectiveEngine()
    serving.open(EngineConfig("cpu"))
    receiving.open(EngineConfig("cpu"))
    made = TcpBackend.create

    def refuse(backend: TcpBackend, rank: int, channel: Channel, deadline: float) -> Group:
        if rank == RECEIVER:
            raise MemoryError
        return made(backend, rank, channel, deadline)

    monkeypatch.setattr(TcpBackend, "create", refuse)
    try:
        with pytest.raises(EngineError, match="MemoryError"):
            receiving.connect(serving.endpoint, 5.0)
    finally:
        receiving.close()
        serving.close()


def test_a_child_that_exits_leaves_the_listener_of_its_parent() -> None:
    serving, receiving = CollectiveEngine(), CollectiveEngine()
    serving.open(EngineConfig("cpu"))
    child = os.fork()
    if not child:
        try:
            serving._end()  # what atexit calls in a child that ends with sys.exit
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    receiving.open(EngineConfig("cpu"))
    try:
        receiving.connect(serving.endpoint, 5.0)
    finally:
        receiving.close()
        serving.close()


def test_an_endpoint_is_read_again_and_its_text_shows_no_secret_in_errors() -> None:
    own = Endpoint(backend="tcp", host="10.0.0.1", port=1234, secret=SECRET)
    assert decode(encode(own)) == own
    text = encode(own)
    assert "secret" not in repr(own)
    for broken in (
        text.replace("1234", "0"),
        text.replace('"v":1', '"v":2'),
        text[:-5],
        text.replace("tcp", "t" * 99),
    ):
        with pytest.raises(EngineError) as caught:
            decode(broken)
        assert text.split('"secret":"')[1][:20] not in str(caught.value)


def test_a_lane_to_another_kind_of_device_is_known_before_connecting() -> None:
    text = encode(Endpoint(backend="tcp", host="10.0.0.1", port=1234, secret=SECRET))
    assert CollectiveEngine.lane_obstacle(text, EngineConfig("cpu")) is None
    for device in ("cuda:0", "npu:0"):
        assert CollectiveEngine.lane_obstacle(text, EngineConfig(device))
    with pytest.raises(EngineError) as caught:
        CollectiveEngine.lane_obstacle("nonsense", EngineConfig("cpu"))
    assert (caught.value.side, caught.value.retry_elsewhere) == ("seed", True)


def test_a_seed_on_the_same_gpu_is_refused_before_connecting_and_by_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "gpu_uuid", lambda index: f"gpu {index}")
    seed = Endpoint(backend="nccl", host="127.0.0.1", port=1, secret=SECRET, gpu="gpu 1")
    assert CollectiveEngine.lane_obstacle(encode(seed), EngineConfig("cuda:0")) is None
    assert "same GPU" in (CollectiveEngine.lane_obstacle(encode(seed), EngineConfig("cuda:1")) or "")
    unknown = msgspec.structs.replace(seed, gpu="")
    assert CollectiveEngine.lane_obstacle(encode(unknown), EngineConfig("cuda:1")) is None

    class Gpus(Backends):
        name: ClassVar[str] = "nccl"

    monkeypatch.setattr(engine, "backend_class", lambda device_type: Gpus)
    receiving = CollectiveEngine()
    receiving.open(EngineConfig("cuda:1"))
    try:
        with pytest.raises(EngineError, match="use engine cuda_ipc") as caught:
            receiving.connect(encode(seed), 5.0)
        assert (caught.value.code, caught.value.side) == ("lane", "receiver")
        assert decode(receiving.endpoint).gpu == "gpu 1"
    finally:
        receiving.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "a" * 64 + ".example"])
def test_an_address_of_another_machine_is_refused_with_the_remedy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Backend] = []

    def close(backend: Backend) -> None:
        closed.append(backend)

    monkeypatch.setattr(TcpBackend, "close", close)
    opening = CollectiveEngine()
    with pytest.raises(EngineError, match="rfork_seed_advertise_host"):
        opening.open(EngineConfig("cpu", host=host))
    assert len(closed) == 1
    assert opening._backend is None
