"""A seed of the collective engine: requests, bounds, and the end."""

from __future__ import annotations

import socket
import struct
from collections import Counter

import msgspec
import pytest

from tests.recorded_groups import (
    NBYTES,
    SECRET,
    START,
    Backends,
    Recorded,
    backend,
    connected,
    eventually,
    joined,
    read,
    seed,
    soon,
)
from vllm_rfork.engines.collective import channel, messages, sender
from vllm_rfork.engines.collective.channel import Channel, Lost
from vllm_rfork.engines.collective.group import Group, GroupFailed
from vllm_rfork.engines.collective.messages import MAX_SEGMENTS, Join, Read, Refusal, Sending, Sent
from vllm_rfork.engines.collective.plan import Piece
from vllm_rfork.engines.collective.sender import MAX_GROUPS, MAX_SENDS, Sender

__all__ = ["backend", "seed"]  # fixtures


def test_what_is_requested_is_sent_and_confirmed(seed: Sender, backend: Backends) -> None:
    opened = joined(seed)
    read(opened, (START, 10), (START + 990, 10))
    messages.receive(opened, Sent, soon())
    assert backend.sent == [Piece(START, 10), Piece(START + 990, 10)]
    opened.close()
    eventually(lambda: len(backend.closed) == 1)


def test_another_kind_of_device_is_refused_as_a_lane(seed: Sender) -> None:
    for wrong in ({"backend": "tcp"}, {"v": 2}):
        with pytest.raises(Refusal, match="recorded") as caught:
            joined(seed, **wrong)  # type: ignore[arg-type]
        assert caught.value.code == "lane"


def test_receivers_beyond_the_bound_are_refused_as_long_as_the_others_stay(seed: Sender) -> None:
    admitted = [joined(seed) for _ in range(MAX_GROUPS)]
    with pytest.raises(Refusal) as caught:
        joined(seed)
    assert caught.value.code == "busy"
    admitted.pop().close()

    def room() -> bool:
        try:
            admitted.append(joined(seed))
        except Refusal:
            return False
        return True

    eventually(room)
    for each in admitted:
        each.close()


def test_receivers_that_are_killed_while_they_join_leave_their_places(
    seed: Sender,
) -> None:
    """A connection that was reset has no address any more."""
    for _ in range(60):
        opened = connected(seed)
        opened._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        messages.send(opened, Join(messages.VERSION, "recorded", "", 10.0), soon())
        opened.close()
        eventually(lambda: not seed._sessions)
    assert seed.groups._value == MAX_GROUPS


@pytest.mark.parametrize("foreign", [(START - 1, 2), (START, NBYTES + 1), (START + NBYTES, 1), (1, 1), (2**61, 2**61)])
def test_one_foreign_address_refuses_the_whole_request(
    seed: Sender, backend: Backends, foreign: tuple[int, int]
) -> None:
    opened = joined(seed)
    with pytest.raises(Refusal, match="do not lie in one registered region") as caught:
        read(opened, (START, 10), foreign)
    assert caught.value.code == "address"
    assert backend.sent == []
    read(opened, (START, 10))
    messages.receive(opened, Sent, soon())
    opened.close()


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[[[[",
        b'{"type":"read","segments":[[0,5]],"timeout_s":1}',
        b'{"type":"read","segments":[[-5,5]],"timeout_s":1}',
        b'{"type":"read","segments":[[4096,99999999999999999999999]],"timeout_s":1}',
        b'{"type":"read","segments":[[4096,5]],"timeout_s":1e99}',
        b'{"type":"sent"}',
        msgspec.json.encode(Read([(START, 1)] * (MAX_SEGMENTS + 1), 1.0)),
    ],
)
def test_an_unusable_request_ends_its_connection(seed: Sender, backend: Backends, body: bytes) -> None:
    opened = joined(seed)
    opened.send(body, soon())
    with pytest.raises(Lost):
        opened.receive(soon())
    eventually(lambda: len(backend.closed) == 1)
    assert backend.sent == []
    joined(seed).close()


def test_sends_beyond_the_bound_wait_and_are_refused_at_their_deadline(seed: Sender, backend: Backends) -> None:
    backend.held.set()
    senders = [joined(seed) for _ in range(MAX_SENDS)]
    for each in senders:
        read(each, (START, 10))
        assert backend.sending.acquire(timeout=20.0)
    waiting = joined(seed)
    with pytest.raises(Refusal, match="other batches") as caught:
        read(waiting, (START, 10), timeout_s=0.1)
    assert caught.value.code == "busy"
    backend.held.clear()
    for each in senders:
        messages.receive(each, Sent, soon())
    read(waiting, (START, 10))
    for each in (*senders, waiting):
        each.close()


def test_a_batch_beyond_the_engines_limits_is_refused(seed: Sender, backend: Backends) -> None:
    seed.holds = lambda address, nbytes: True
    opened = joined(seed)
    messages.send(opened, Read([(START, 1 << 36)] * MAX_SEGMENTS, 3600.0), soon())
    try:
        with pytest.raises(Refusal):
            messages.receive(opened, Sending, soon())
    finally:
        opened.close()


def test_a_receiver_that_leaves_during_a_send_frees_the_send_before_its_deadline(
    seed: Sender, backend: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "MESSAGE_S", 600.0)
    backend.held.set()
    opened = joined(seed)
    read(opened, (START, 10), timeout_s=600.0)
    opened.close()
    eventually(lambda: len(backend.closed) == 1)
    assert backend.sent == []


def test_stopping_ends_sends_and_admits_nobody(seed: Sender, backend: Backends) -> None:
    backend.held.set()
    opened = joined(seed)
    read(opened, (START, 10))
    port = seed.port
    seed.stop(20.0)
    seed.stop(20.0)
    assert len(backend.closed) == 1
    assert backend.sent == []
    with pytest.raises(Lost):
        channel.connect("127.0.0.1", port, SECRET, soon())
    opened.close()


def test_a_group_that_does_not_end_keeps_the_memory(seed: Sender, backend: Backends) -> None:
    backend.held.set()
    backend.never_ends = True
    opened = joined(seed)
    read(opened, (START, 10))
    opened.close()
    eventually(lambda: len(backend.closed) == 1)
    with pytest.raises(GroupFailed) as caught:
        seed.stop(20.0)
    assert caught.value.in_flight
    with seed._lock:
        seed._sessions.clear()


class Unfinished(Backends):
    """Groups that are never complete, at a price or not."""

    price = True

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        error = GroupFailed("the peer is gone")
        error.unfinished = self.price
        raise error


def test_a_seed_whose_library_keeps_too_much_of_unfinished_groups_refuses_the_lane(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "MAX_UNFINISHED", 2)
    monkeypatch.setattr(sender, "_unfinished", Counter())
    failing = Unfinished()
    serving = Sender(failing, "127.0.0.1", SECRET, lambda at, n: True)
    try:
        for failing.price in (False, False, True, False, True):
            opened = joined(serving)
            with pytest.raises(Lost):
                opened.receive(soon())
            opened.close()
        eventually(lambda: not serving._sessions)
        with pytest.raises(Refusal, match="2 receivers of this worker") as caught:
            joined(serving)
        assert caught.value.code == "lane"
    finally:
        serving.stop(20.0)


def test_a_seed_that_resumes_has_lost_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library keeps belongs to the process, and a seed that resumes opens new engines."""
    monkeypatch.setattr(sender, "_unfinished", Counter())
    monkeypatch.setattr(sender, "MAX_UNFINISHED", 1)
    error = GroupFailed("the peer died")
    error.unfinished = True
    suspended = Sender(Backends(), "127.0.0.1", SECRET, lambda at, n: True)
    suspended.note(error)
    suspended.stop(20.0)
    resumed = Sender(Backends(), "127.0.0.1", SECRET, lambda at, n: True)
    try:
        with pytest.raises(Refusal, match="1 receivers of this worker"):
            joined(resumed)
    finally:
        resumed.stop(20.0)


class Unstartable(Recorded):
    """A group whose close cannot start its thread."""

    def close(self) -> None:
        raise RuntimeError("can't start new thread")


class Exhausted(Backends):
    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        return Unstartable(self)


def test_a_close_that_raises_anything_gives_the_place_back_and_keeps_the_memory() -> None:
    serving = Sender(Exhausted(), "127.0.0.1", SECRET, lambda at, n: True)
    joined(serving).close()
    eventually(lambda: serving.groups._value == MAX_GROUPS)
    with pytest.raises(GroupFailed) as caught:
        serving.stop(20.0)
    assert caught.value.in_flight
