"""Groups of two that move no bytes, a seed that serves them, and what a receiver says to it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import pytest

from vllm_rfork.engines.collective import channel, messages
from vllm_rfork.engines.collective.channel import Channel
from vllm_rfork.engines.collective.group import Backend, Group, GroupFailed
from vllm_rfork.engines.collective.messages import Join, Joined, Read, Sending
from vllm_rfork.engines.collective.plan import Piece
from vllm_rfork.engines.collective.sender import Sender

SECRET = secrets.token_bytes(32)
#: The memory that the seed holds: an address, and a length in bytes.
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
