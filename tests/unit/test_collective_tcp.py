"""Groups of two over TCP: where the bytes go, and what ends a group."""

from __future__ import annotations

import ctypes
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from tests.recorded_groups import soon
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.collective import channel, messages, tcp
from vllm_rfork.engines.collective.channel import Channel, Lost
from vllm_rfork.engines.collective.engine import CollectiveEngine
from vllm_rfork.engines.collective.group import STALL_S, GroupFailed
from vllm_rfork.engines.collective.messages import Read, Sending, Sent
from vllm_rfork.engines.collective.plan import Piece
from vllm_rfork.engines.collective.tcp import TcpGroup
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment


class Ends:
    """The two ends of a group, and memory of each."""

    def __init__(self) -> None:
        keys = secrets.token_bytes(32), secrets.token_bytes(32)
        one, other = socket.socketpair()
        self.seed, self.receiver = Channel(one, *keys), Channel(other, *reversed(keys))
        self.raw = one

    def receive(self, pieces: Sequence[Piece], seconds: float = 20.0) -> None:
        TcpGroup(self.receiver).receive(pieces, soon(seconds))

    def send(self, pieces: Sequence[Piece]) -> threading.Thread:
        thread = threading.Thread(target=TcpGroup(self.seed).send, args=(pieces, soon()))
        thread.start()
        return thread


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setattr(channel, "_TICK", struct.pack("@ll", 0, 20_000))
    made = Ends()
    yield made
    made.seed.close()
    made.receiver.close()


def memory(nbytes: int, fill: bytes = b"\0") -> tuple[Any, int]:
    made = ctypes.create_string_buffer(fill * (nbytes // len(fill)), nbytes)
    return made, ctypes.addressof(made)


def partly(some: Callable[[Sequence[memoryview]], int]) -> Callable[[Sequence[memoryview]], int]:
    random = Random(2)
    return lambda buffers: some([buffers[0][: random.randrange(1, 50_000)]])


def test_each_byte_arrives_where_it_was_requested_and_nowhere_else(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many parts, and in many calls for each, of which each moves a little of the first piece."""
    monkeypatch.setattr(tcp, "CALL_PIECES", 5)
    random = Random(1)
    monkeypatch.setattr(ends.seed, "send_some", partly(ends.seed.send_some))
    monkeypatch.setattr(ends.receiver, "receive_some", partly(ends.receiver.receive_some))
    lengths = [1, 3_000_000, 7, *[random.randrange(1, 5000) for _ in range(40)], 700_000]
    total = sum(lengths)
    source, source_at = memory(total, random.randbytes(total))
    target, target_at = memory(2 * total + 100)
    sent, received, at, gap = [], [], 0, 0
    for nbytes in lengths:
        sent.append(Piece(source_at + at, nbytes))
        received.append(Piece(target_at + at + gap, nbytes))
        at, gap = at + nbytes, gap + random.randrange(1, 50)
    order = list(range(len(lengths)))
    random.shuffle(order)
    sending = ends.send([sent[number] for number in order])
    ends.receive([received[number] for number in order])
    sending.join(20.0)
    expected = bytearray(2 * total + 100)
    for (start, nbytes), (came, _) in zip(sent, received, strict=True):
        expected[came - target_at : came - target_at + nbytes] = source.raw[
            start - source_at : start - source_at + nbytes
        ]
    assert target.raw == expected


def test_what_follows_the_bytes_is_the_next_frame(ends: Ends) -> None:
    source, source_at = memory(100, b"x")
    target, target_at = memory(200)
    messages.send(ends.seed, Sending(), soon())
    ends.send([Piece(source_at, 100)]).join()
    messages.send(ends.seed, Sent(), soon())
    messages.receive(ends.receiver, Sending, soon())
    ends.receive([Piece(target_at, 100)])
    messages.receive(ends.receiver, Sent, soon())
    assert target.raw == source.raw + bytes(100)


def test_more_bytes_than_requested_end_the_connection_and_are_not_written(ends: Ends) -> None:
    kept, source_at = memory(5000, b"x")
    target, target_at = memory(5000)
    ends.send([Piece(source_at, 5000)]).join()
    ends.receive([Piece(target_at, 10)])
    with pytest.raises(Lost):
        messages.receive(ends.receiver, Sent, soon())
    assert target.raw == kept.raw[:10] + bytes(4990)


@pytest.mark.parametrize("direction", ["send", "receive"])
def test_a_peer_that_makes_no_progress_is_given_up_after_the_bound(
    direction: str, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "STALL_S", 0.2)
    _, at = memory(1 << 23)
    group = TcpGroup(ends.seed if direction == "send" else ends.receiver)
    began = time.monotonic()
    with pytest.raises(GroupFailed, match="no progress") as caught:
        getattr(group, direction)([Piece(at, 1 << 23)], soon())
    assert caught.value.late
    assert not caught.value.in_flight
    assert 0.2 <= time.monotonic() - began < 5.0


def test_a_peer_that_sends_a_little_now_and_then_is_given_up_at_the_deadline(ends: Ends) -> None:
    _, at = memory(1000)
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            ends.raw.send(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(GroupFailed) as caught:
            ends.receive([Piece(at, 1000)], 0.3)
    finally:
        stop.set()
        thread.join()
    assert caught.value.late


@pytest.mark.parametrize("direction", ["send", "receive"])
def test_a_peer_that_is_gone_is_noticed_at_once(direction: str, ends: Ends) -> None:
    _, at = memory(1 << 23)
    ours, theirs = (ends.seed, ends.receiver) if direction == "send" else (ends.receiver, ends.seed)
    theirs.close()
    with pytest.raises(GroupFailed, match="the peer") as caught:
        getattr(TcpGroup(ours), direction)([Piece(at, 1 << 23)], soon())
    assert not caught.value.late


def test_an_abort_ends_a_wait_in_another_thread_at_once(ends: Ends) -> None:
    """It would take STALL_S otherwise, and so would closing a seed whose receiver is stopped."""
    _, at = memory(100)
    group, waiting = TcpGroup(ends.receiver), threading.Event()
    some = ends.receiver.receive_some

    def announced(buffers: Sequence[memoryview]) -> int:
        waiting.set()
        return some(buffers)

    ends.receiver.receive_some = announced  # type: ignore[method-assign]
    failures: list[GroupFailed] = []

    def receive() -> None:
        with pytest.raises(GroupFailed) as caught:
            group.receive([Piece(at, 100)], soon())
        failures.append(caught.value)

    reader = threading.Thread(target=receive)
    reader.start()
    assert waiting.wait(20.0)
    began = time.monotonic()
    group.abort()
    reader.join()
    assert time.monotonic() - began < STALL_S / 2
    assert not failures[0].late


def test_a_member_that_sends_nonsense_costs_a_seed_its_group_alone() -> None:
    """A library's own data connection ended the process on a frame that it did not expect."""
    source, source_at = memory(1 << 23, b"x")
    target, target_at = memory(1 << 23)
    serving, receiving, hostile = CollectiveEngine(), CollectiveEngine(), CollectiveEngine()
    try:
        for each in (serving, receiving, hostile):
            each.open(EngineConfig("cpu"))
        serving.register([Region(source_at, 1 << 23)])
        receiving.register([Region(target_at, 1 << 23)])
        for nonsense in (b"", struct.pack("<6Q", 148, 1, 0, 0, 100, 0), secrets.token_bytes(1 << 20)):
            for requested in (False, True):
                hostile.connect(serving.endpoint, 20.0)
                opened = hostile._peers[serving.endpoint]._channel
                assert opened is not None
                if requested:
                    messages.send(opened, Read([(source_at, 1 << 23)], 5.0), soon())
                with suppress(OSError):
                    opened._socket.sendall(nonsense)
                hostile.disconnect(serving.endpoint)
        receiving.connect(serving.endpoint, 20.0)
        receiving.read(serving.endpoint, [Segment(target_at, source_at, 1 << 23)], 20.0)
        assert target.raw == source.raw
    finally:
        for each in (hostile, receiving, serving):
            each.close()
