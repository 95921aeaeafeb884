"""One connection of an HTTP server: what it counts, what it waits for, and how an answer is written to it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from aiohttp import web

from vllm_rfork.net.streams import BrokenStreamError, Stream

#: An answer is written in pieces of this size: that is what an unread one costs, since aiohttp may copy a piece.
CHUNK_NBYTES = 16 * 1024
#: First byte of a TLS connection: a record of type handshake.
_TLS_BEGINS = b"\x16"


class Phase(enum.Enum):
    """The event that a connection waits for."""

    #: The TLS handshake, or the first byte, which differs between TLS and plain HTTP.
    OPENING = "to begin"
    #: The first byte of a request to the end of its head.
    HEAD = "for its request"
    #: The handler. The peer waits.
    ANSWER = "for its answer"
    #: The handler of a call that may be held for long.
    HELD = "for what it was held for"
    #: The peer, to take the answer.
    WRITE = "for its answer to be taken"
    #: The next request.
    IDLE = "for its next request"


@dataclass(frozen=True)
class Limits:
    """Limits for peers. Times in seconds, sizes in bytes.

    Attributes:
        connections: open at once.
        request_nbytes: all that may be sent for one request, body included.
        opening_s, head_s, answer_s, held_s, write_s, idle_s: the longest time in the phase of that name.
    """

    connections: int
    request_nbytes: int = 64 * 1024
    opening_s: float = 10.0
    head_s: float = 20.0
    answer_s: float = 60.0
    held_s: float = 60.0
    write_s: float = 60.0
    idle_s: float = 75.0

    def of(self, phase: Phase) -> float:
        """The longest time in ``phase``."""
        return cast(float, getattr(self, f"{phase.name.lower()}_s"))


class Owner(Protocol):
    """The limiter that a connection reports to."""

    limits: Limits

    def began(self, connection: Connection, protocol: asyncio.BaseProtocol) -> None:
        """``connection`` is open, and its request may come."""

    def request_seen(self, connection: Connection) -> None:
        """``connection``, which was idle, has begun to send another request."""

    def detached(self, protocol: asyncio.BaseProtocol) -> None:
        """The connection of ``protocol`` has left the HTTP server."""

    def ended(self, connection: Connection, protocol: asyncio.BaseProtocol) -> None:
        """``connection`` is closed."""


class _Detached(asyncio.Protocol):
    """In place of the HTTP server's protocol."""

    __slots__ = ("_lost",)

    def __init__(self, lost: Callable[[], None]) -> None:
        self._lost = lost

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()


class Connection(asyncio.Protocol):
    """Passes one connection through to aiohttp, and counts what it sends."""

    # Thousands of receivers may wait at once.
    __slots__ = (
        "_inner",
        "_owner",
        "_received_nbytes",
        "_socket",
        "_taken",
        "_transport",
        "lost",
        "made",
        "path",
        "phase",
    )

    def __init__(self, owner: Owner, inner: asyncio.Protocol) -> None:
        self.phase: Phase | None = None
        self.made = False
        self.lost = False
        self.path = ""
        self._owner = owner
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._socket: Any = None
        self._received_nbytes = 0
        self._taken: asyncio.Future[None] | None = None

    @classmethod
    def of(cls, request: web.BaseRequest) -> Connection | None:
        """The connection of ``request``; None if it is gone, or not one of these."""
        protocol = None if request.transport is None else request.transport.get_protocol()
        return protocol if isinstance(protocol, cls) else None

    def detach(self, lost: Callable[[], None]) -> None:
        """Take the connection from the HTTP server, for which it has ended: the handler is cancelled.

        It still counts, in its phase. What the peer sends is dropped; ``lost`` is called when the connection has ended.
        """
        inner, self._inner = cast(Any, self._inner), _Detached(lost)
        self._owner.detached(inner)
        inner.transport = None  # else the server would close it
        inner.connection_lost(None)

    def write(self, data: bytes, *, last: bool = False) -> None:
        """Send ``data`` on a detached connection, and close it after the ``last``."""
        if self._transport is not None and not self.lost:
            self._transport.write(data)
            if last:
                self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to read. Unsent bytes pause the writer from the first one, so ``taken`` is exact."""
        self._transport = cast(asyncio.Transport, transport)
        self._socket = transport.get_extra_info("socket")
        self._transport.set_write_buffer_limits(high=1, low=0)  # 0 would pause TLS for ever
        self.made = True
        self._owner.began(self, self._inner)
        self._inner.connection_made(transport)

    def begin_request(self) -> None:
        """Count the bytes that are received from now on for another request."""
        self._received_nbytes = 0

    def data_received(self, data: bytes) -> None:
        """Pass ``data`` on, unless it is more than a request may have."""
        if self.lost:
            return
        if self.phase is Phase.IDLE:
            self._owner.request_seen(self)
        self._received_nbytes += len(data)
        if self._received_nbytes > self._owner.limits.request_nbytes:
            self.abort()
            return
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass the end of the peer's bytes on."""
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        """Bytes wait for the peer."""
        if self._taken is None:
            self._taken = asyncio.get_running_loop().create_future()
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """The kernel has taken all bytes."""
        self._release()
        self._inner.resume_writing()

    async def taken(self) -> None:
        """Return once the kernel has taken everything that was written, or the connection is lost."""
        if self._taken is not None and not self.lost:
            await self._taken

    def connection_lost(self, exc: Exception | None) -> None:
        """End every wait on this connection."""
        self.lost = True
        self._owner.ended(self, self._inner)
        self._release()
        self._inner.connection_lost(exc)

    def abort(self) -> None:
        """Close the connection at once, without the bytes that are still to be written."""
        if self._transport is None:
            return
        try:
            self._transport.abort()
        except AttributeError:
            # In Python 3.11.2 a TLS transport that was closed twice has forgotten its connection.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None and not taken.done():
            taken.set_result(None)


@dataclass(frozen=True)
class Reply:
    """An answer. ``still_true`` is called before each piece of the body; once it returns False, the body breaks off."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    still_true: Callable[[], bool] = lambda: True
    #: Instead of ``body``.
    stream: Stream | None = None
    #: The connection ends with this answer.
    last: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the body."""
        return len(self.body) if self.stream is None else self.stream.nbytes


async def write_reply(request: web.BaseRequest, reply: Reply, connection: Connection) -> web.StreamResponse:
    """Write ``reply`` as the peer takes it.

    Raises:
        BrokenStreamError: its stream ended early, and the answer broke off.
    """
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    response.content_length = reply.nbytes
    if reply.last:
        response.force_close()
    try:
        await response.prepare(request)
        async with contextlib.aclosing(_pieces(reply, request.method)) as pieces:
            async for piece in pieces:
                # asyncio drops what is written to a lost TLS connection, with a warning for each piece.
                if connection.lost or not reply.still_true():
                    connection.abort()
                    return response
                # Returns once the peer has taken what went before: nobody can make this process hold copies.
                await response.write(piece)
                await connection.taken()
                await asyncio.sleep(0)  # so that a loss is noticed, and others have their turn
    except BrokenStreamError:
        connection.abort()
        raise
    finally:
        if reply.stream is not None:
            reply.stream.ended()
    await response.write_eof()
    return response


async def _pieces(reply: Reply, method: str) -> AsyncGenerator[memoryview, None]:
    """The body in pieces that cost little if they are not taken. Raises BrokenStreamError."""
    if method == "HEAD":
        return
    if reply.stream is None:
        for piece in _slices(reply.body):
            yield piece
        return
    async with contextlib.aclosing(reply.stream.read()) as read:
        async for whole in read:
            for piece in _slices(whole):
                yield piece


def _slices(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[offset : offset + CHUNK_NBYTES] for offset in range(0, len(view), CHUNK_NBYTES))


async def begins_tls(sock: socket.socket) -> bool:
    """Return True if the peer begins with TLS; its bytes stay in the socket."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    while True:
        loop.add_reader(sock, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(sock)
        try:
            return sock.recv(1, socket.MSG_PEEK) == _TLS_BEGINS
        except BlockingIOError:
            readable.clear()  # a spurious wake-up
