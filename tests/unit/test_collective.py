"""The collective engine's control connection and its seed's side, with groups that move no bytes."""

from __future__ import annotations

import ctypes
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import msgspec
import pytest

from vllm_rfork.engines import capture_gate
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.collective import channel, messages, receiver, sender
from vllm_rfork.engines.collective.channel import MAX_FRAME_NBYTES, Channel, Lost
from vllm_rfork.engines.collective.endpoint import Endpoint, decode, encode
from vllm_rfork.engines.collective.engine import CollectiveEngine
from vllm_rfork.engines.collective.gloo import GlooBackend, GlooGroup, published_problem
from vllm_rfork.engines.collective.group import RECEIVER, SEED, STALL_S, Backend, Group, GroupFailed
from vllm_rfork.engines.collective.messages import MAX_SEGMENTS, Join, Joined, Read, Refusal, Sending, Sent, Share
from vllm_rfork.engines.collective.plan import DIRECT_NBYTES, PART_PIECES, STAGED_NBYTES, Message, Piece
from vllm_rfork.engines.collective.receiver import Peer
from vllm_rfork.engines.collective.sender import MAX_GROUPS, MAX_SENDS, MAX_STRANGERS, Sender
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.segments import Segment

SECRET = secrets.token_bytes(32)
START, NBYTES = 4096, 1000


def soon(seconds: float = 20.0) -> float:
    return time.monotonic() + seconds


class Recorded(Group):
    """A group that records what is sent, and waits in ``send`` while ``held`` is set."""

    def __init__(self, backend: Backends) -> None:
        self._backend = backend
        self._aborted = threading.Event()
        self._closed = False

    def send(self, pieces: Sequence[Piece], deadline: float) -> None:
        self._backend.sending.release()
        while self._backend.held.is_set() and not self._aborted.is_set() and time.monotonic() < deadline:
            time.sleep(0.005)
        if self._aborted.is_set() or time.monotonic() >= deadline:
            raise GroupFailed("aborted", in_flight=self._backend.never_ends)
        self._backend.sent += pieces

    def receive(self, pieces: Sequence[Piece], deadline: float) -> None:
        raise NotImplementedError

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._backend.closed.append(self)
        if self._backend.never_ends:
            raise GroupFailed("it does not end", in_flight=True)


class Backends(Backend):
    name: ClassVar[str] = "recorded"
    captures: ClassVar[bool] = True

    def __init__(self, index: int = 0) -> None:
        self.sent: list[Piece] = []
        self.closed: list[Group] = []
        self.held = threading.Event()
        self.sending = threading.Semaphore(0)
        self.never_ends = False

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        return Recorded(self)

    def close(self) -> None:
        pass


@pytest.fixture
def backend() -> Backends:
    return Backends()


@pytest.fixture
def seed(backend: Backends) -> Iterator[Sender]:
    serving = Sender(backend, "127.0.0.1", SECRET, lambda at, n: at >= START and at + n <= START + NBYTES)
    yield serving
    backend.never_ends = False
    serving.stop(20.0)


def connected(seed: Sender, secret: bytes = SECRET) -> Channel:
    return channel.connect("127.0.0.1", seed.port, secret, soon())


def joined(seed: Sender, *, backend: str = "recorded", v: int = messages.VERSION) -> Channel:
    opened = connected(seed)
    messages.send(opened, Join(v, backend, "a lease", 10.0), soon())
    messages.receive(opened, Joined, soon())
    return opened


def read(opened: Channel, *segments: tuple[int, int], timeout_s: float = 20.0) -> None:
    messages.send(opened, Read(list(segments), timeout_s), soon())
    messages.receive(opened, Sending, soon())


def eventually(condition: Callable[[], bool]) -> None:
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- who is admitted ----------------------------------------------------------------------------------------------


def test_what_is_requested_is_sent_and_confirmed(seed: Sender, backend: Backends) -> None:
    opened = joined(seed)
    read(opened, (START, 10), (START + 990, 10))
    messages.receive(opened, Sent, soon())
    assert backend.sent == [Piece(START, 10), Piece(START + 990, 10)]
    opened.close()
    eventually(lambda: len(backend.closed) == 1)


def test_a_peer_without_the_secret_is_turned_away(seed: Sender, backend: Backends) -> None:
    with pytest.raises(Lost):
        connected(seed, secrets.token_bytes(32))
    joined(seed).close()


def test_a_seed_proves_nothing_to_a_peer_that_has_not_proved_the_secret(seed: Sender) -> None:
    with socket.create_connection(("127.0.0.1", seed.port)) as stranger:
        stranger.settimeout(20.0)
        assert len(stranger.recv(34, socket.MSG_WAITALL)) == 34
        stranger.sendall(secrets.token_bytes(48))
        assert stranger.recv(1) == b""


def test_a_seed_without_the_secret_is_noticed() -> None:
    """It could only replay what a receiver sent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def pretend() -> None:
            with listening.accept()[0] as sock:
                sock.sendall(b"rfork-collective-1" + bytes(16))
                sock.sendall(sock.recv(48)[16:])

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(Lost, match="secret"):
            channel.connect("127.0.0.1", listening.getsockname()[1], SECRET, soon())
        thread.join()


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n\r\n", bytes(48), bytes(100_000), b""])
def test_nonsense_costs_its_own_connection(seed: Sender, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", seed.port)) as stranger:
        stranger.sendall(text)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(20.0)
        try:
            while stranger.recv(4096):
                pass
        except ConnectionResetError:
            pass
    joined(seed).close()


def test_strangers_that_send_nothing_are_few_and_are_dropped(seed: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MESSAGE_S", 0.2)
    strangers = [socket.create_connection(("127.0.0.1", seed.port)) for _ in range(MAX_STRANGERS + 5)]
    for stranger in strangers:
        stranger.settimeout(20.0)
        assert len(stranger.recv(100)) in (0, 34)
        assert stranger.recv(100) == b""
        stranger.close()
    joined(seed).close()


def test_another_kind_of_device_is_refused_as_a_lane(seed: Sender) -> None:
    for wrong in ({"backend": "gloo"}, {"v": 2}):
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


# --- requests -----------------------------------------------------------------------------------------------------


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


def test_a_frame_that_is_changed_or_repeated_or_too_large_ends_the_connection() -> None:
    keys = secrets.token_bytes(32), secrets.token_bytes(32)

    def pair() -> tuple[Channel, Channel, socket.socket]:
        one, other = socket.socketpair()
        return Channel(one, *keys), Channel(other, *reversed(keys)), one

    for change in (
        lambda frame: frame[:6] + b"X" + frame[7:],
        lambda frame: frame[:-1] + bytes([frame[-1] ^ 1]),
        lambda frame: struct.pack(">I", MAX_FRAME_NBYTES + 1) + frame[4:],
    ):
        first, second, _ = pair()
        first.send(b"a message", soon())
        frame = second._socket.recv(1000)
        first._socket.sendall(change(frame))
        with pytest.raises(Lost):
            second.receive(soon())
    first, second, raw = pair()
    first.send(b"a message", soon())
    frame = second._socket.recv(1000)
    raw.sendall(frame * 2)
    assert second.receive(soon()) == b"a message"
    with pytest.raises(Lost, match="changed"):
        second.receive(soon())
    with pytest.raises(Lost, match="too large"):
        first.send(bytes(MAX_FRAME_NBYTES + 1), soon())


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


def test_while_graphs_are_captured_nothing_is_sent_and_the_receiver_is_told(seed: Sender, backend: Backends) -> None:
    opened = joined(seed)
    with capture_gate.gate.capturing() as idle:
        assert idle
        with pytest.raises(Refusal, match="captures") as caught:
            read(opened, (START, 10), timeout_s=0.1)
        assert caught.value.code == "busy"
        assert backend.sent == []
    read(opened, (START, 10))
    messages.receive(opened, Sent, soon())
    opened.close()


def test_a_batch_beyond_the_engines_limits_is_refused(seed: Sender, backend: Backends) -> None:
    seed.holds = lambda address, nbytes: True
    opened = joined(seed)
    messages.send(opened, Read([(START, 1 << 36)] * MAX_SEGMENTS, 3600.0), soon())
    try:
        with pytest.raises(Refusal):
            messages.receive(opened, Sending, soon())
    finally:
        opened.close()


# --- captures ----------------------------------------------------------------------------------------------------


def test_a_seed_stops_while_a_receiver_waits_for_the_end_of_a_capture(seed: Sender, backend: Backends) -> None:
    opened = connected(seed)
    with capture_gate.gate.capturing():
        messages.send(opened, Join(messages.VERSION, "recorded", "", 30.0), soon())
        time.sleep(0.5)
        try:
            seed.stop(3.0)
        finally:
            opened.close()


class Slow(Backends):
    """A group that is not created before its deadline: the receiver was stopped after it had joined."""

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        while time.monotonic() < deadline:
            time.sleep(0.01)
        raise GroupFailed("not created in time", late=True)


def test_a_receiver_that_stops_while_it_joins_does_not_hold_up_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sender._CREATE_S < capture_gate.CAPTURE_WAITS_S
    monkeypatch.setattr(sender, "_CREATE_S", 0.5)
    serving = Sender(Slow(), "127.0.0.1", SECRET, lambda at, n: True)
    opened = connected(serving)
    try:
        messages.send(opened, Join(messages.VERSION, "recorded", "", 60.0), soon())
        messages.receive(opened, Joined, soon())
        with capture_gate.gate.capturing(5.0) as idle:
            assert idle
    finally:
        opened.close()
        serving.stop(60.0)


def test_a_send_that_fails_while_a_capture_waits_lets_the_capture_begin(seed: Sender, backend: Backends) -> None:
    backend.held.set()
    opened = joined(seed)
    read(opened, (START, 10))
    result: list[bool] = []

    def capture() -> None:
        with capture_gate.gate.capturing() as idle:
            result.append(idle)

    thread = threading.Thread(target=capture)
    thread.start()
    time.sleep(0.3)
    opened.close()  # the send fails at once
    thread.join(20.0)
    assert result == [True]


def test_a_capture_goes_first_between_the_parts_of_a_batch(seed: Sender, backend: Backends) -> None:
    backend.held.set()
    opened = joined(seed)
    read(opened, *[(START, 1)] * (PART_PIECES + 1))
    assert backend.sending.acquire(timeout=20.0)
    before: list[int] = []

    def capture() -> None:
        with capture_gate.gate.capturing() as idle:
            before.append(len(backend.sent) if idle else -1)

    thread = threading.Thread(target=capture)
    thread.start()
    eventually(lambda: capture_gate.gate._capturing > 0)
    backend.held.clear()
    thread.join(20.0)
    messages.receive(opened, Sent, soon())
    assert before == [PART_PIECES]
    assert len(backend.sent) == PART_PIECES + 1
    opened.close()


# --- the end --------------------------------------------------------------------------------------------------------


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


def test_lack_of_memory_is_an_engine_error_and_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    serving, receiving = CollectiveEngine(), CollectiveEngine()
    serving.open(EngineConfig("cpu"))
    receiving.open(EngineConfig("cpu"))
    made = torch.empty

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return made(*args, **kwargs)

    try:
        monkeypatch.setattr(torch, "empty", refuse)
        with pytest.raises(EngineError):
            receiving.connect(serving.endpoint, 5.0)
    finally:
        monkeypatch.setattr(torch, "empty", made)
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


# --- the rest -------------------------------------------------------------------------------------------------------


def test_an_abort_ends_a_wait_in_another_thread_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take STALL_S otherwise, and so would closing a seed whose receiver is stopped."""
    keys = secrets.token_bytes(32), secrets.token_bytes(32)
    waiting, finish = threading.Event(), GlooGroup._finish
    groups: dict[int, GlooGroup] = {}

    def announced(group: GlooGroup, work: object, deadline: float) -> None:
        waiting.set()
        finish(group, work, deadline)

    monkeypatch.setattr(GlooGroup, "_finish", announced)
    memory = ctypes.create_string_buffer(100)

    def receive() -> None:
        with pytest.raises(GroupFailed, match="aborted"):
            groups[RECEIVER].receive([Piece(ctypes.addressof(memory), 100)], soon())

    with socket.create_server(("127.0.0.1", 0)) as listening:
        ends = socket.create_connection(listening.getsockname()), listening.accept()[0]
    channels = {RECEIVER: Channel(ends[0], *keys), SEED: Channel(ends[1], *reversed(keys))}
    threads = [
        threading.Thread(target=lambda rank=rank: groups.update({rank: GlooGroup(rank, channels[rank], soon())}))
        for rank in channels
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader = threading.Thread(target=receive)
    reader.start()
    assert waiting.wait(20.0)
    began = time.monotonic()
    groups[RECEIVER].abort()
    reader.join()
    assert time.monotonic() - began < STALL_S / 2
    for rank, group in groups.items():
        group.close()
        channels[rank].close()


def test_values_that_no_gloo_publishes_end_the_group_not_the_process() -> None:
    """gloo itself reads beyond the end of such values: without the check this test is a segmentation fault."""
    for value in (b"", b"x", bytes(170), secrets.token_bytes(170), secrets.token_bytes(60_000)):
        keys = secrets.token_bytes(32), secrets.token_bytes(32)
        listening = socket.create_server(("127.0.0.1", 0))
        with listening, socket.create_connection(listening.getsockname()) as one, listening.accept()[0] as other:
            lying = Channel(other, *reversed(keys))
            messages.send(lying, Share("0/0", value), soon())
            with pytest.raises(Lost, match="unusable value"):
                GlooGroup(SEED, Channel(one, *keys), soon(10.0))


def test_a_group_connects_to_the_other_end_of_its_control_connection_only() -> None:
    def published(name: bytes, address: bytes) -> bytes:
        numbers = len(name).to_bytes(8, "little"), (136).to_bytes(8, "little")
        return numbers[0] + name + numbers[1] + address.ljust(136, b"\0") + bytes(16)

    four = struct.pack("=HH", socket.AF_INET, 80) + socket.inet_aton("10.1.2.3")
    six = struct.pack("=HHI", socket.AF_INET6, 80, 0) + socket.inet_pton(socket.AF_INET6, "fe80::1")
    assert published_problem(published(b"a-host", four), "10.1.2.3") is None
    assert published_problem(published(b"", six), "fe80::1%eth0") is None
    for value, host in (
        (published(b"a-host", four), "10.1.2.4"),
        (published(b"a-host", six), "10.1.2.3"),
        (published(b"a" * 256, four), "10.1.2.3"),
        (published(b"a-host", four) + b"x", "10.1.2.3"),
        (published(b"a-host", four)[:-1], "10.1.2.3"),
        (published(b"a-host", b"\x01\x00" + four[2:]), "10.1.2.3"),
        (published(b"a-host", four).replace(b"\x88", b"\x87"), "10.1.2.3"),
        ((2**64 - 1).to_bytes(8, "little") + bytes(162), "10.1.2.3"),
    ):
        assert published_problem(value, host), value


def test_both_sides_divide_a_batch_alike_and_lose_nothing() -> None:
    from vllm_rfork.engines.collective.plan import messages as divided

    lengths = [1, 70_000, DIRECT_NBYTES * 2 + 5, 10, 128 * 1024, *[100_000] * 100, 3]
    pieces = [Piece(1 << 40, 0)]
    for nbytes in lengths:
        pieces.append(Piece(pieces[-1].address + pieces[-1].nbytes + 7, nbytes))
    found = list(divided(pieces[1:]))
    covered = [(at, at + n) for message in found for at, n in message.pieces]
    assert sum(message.nbytes for message in found) == sum(lengths)
    assert covered == sorted(covered)
    assert all(_bounded(message) for message in found)


def _bounded(message: Message) -> bool:
    return message.nbytes <= (STAGED_NBYTES if len(message.pieces) > 1 else DIRECT_NBYTES)


def test_an_endpoint_is_read_again_and_its_text_shows_no_secret_in_errors() -> None:
    own = Endpoint(backend="gloo", host="10.0.0.1", port=1234, secret=SECRET)
    assert decode(encode(own)) == own
    text = encode(own)
    assert "secret" not in repr(own)
    for broken in (
        text.replace("1234", "0"),
        text.replace('"v":1', '"v":2'),
        text[:-5],
        text.replace("gloo", "g" * 99),
    ):
        with pytest.raises(EngineError) as caught:
            decode(broken)
        assert text.split('"secret":"')[1][:20] not in str(caught.value)


def test_a_lane_to_another_kind_of_device_is_known_before_connecting() -> None:
    text = encode(Endpoint(backend="gloo", host="10.0.0.1", port=1234, secret=SECRET))
    assert CollectiveEngine.lane_obstacle(text, EngineConfig("cpu")) is None
    for endpoint, device in ((text, "cuda:0"), (text, "npu:0"), ("nonsense", "cpu")):
        assert CollectiveEngine.lane_obstacle(endpoint, EngineConfig(device))


@pytest.mark.parametrize("host", ["192.0.2.1", "a" * 64 + ".example"])
def test_an_address_of_another_machine_is_refused_with_the_remedy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Backend] = []

    def close(backend: Backend) -> None:
        closed.append(backend)

    monkeypatch.setattr(GlooBackend, "close", close)
    engine = CollectiveEngine()
    with pytest.raises(EngineError, match="rfork_seed_advertise_host"):
        engine.open(EngineConfig("cpu", host=host))
    assert len(closed) == 1
    assert engine._backend is None
