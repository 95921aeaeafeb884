"""The connections of one HTTP server: how many there are, and a deadline for each phase of every one.

A connection is counted from the moment it is accepted, TLS handshake included. While it waits for its peer (to shake
hands, to send a request, to take an answer, to ask again) a deadline runs, and if there are too many connections, the
one that has waited longest makes room for a new one: idle connections never lock others out. A call that is being
decided is never cut off for another.

An answer leaves piece by piece as its peer takes it, and the next request of a connection is not looked at before the
last answer has left: a peer that does not read costs the kernel's buffers and one piece.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web

from vllm_rfork.net.seldom import Seldom

#: An answer leaves in pieces of this size: what an unread one costs, since aiohttp may copy a piece.
_CHUNK_NBYTES = 16 * 1024
#: What a TLS connection begins with: a record of type handshake.
_TLS_BEGINS = b"\x16"


class Phase(enum.Enum):
    """What a connection waits for."""

    #: The TLS handshake, or the first byte, which tells TLS from plain HTTP.
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
    """What peers may take. Times in seconds, sizes in bytes.

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


@dataclass(frozen=True)
class Tls:
    """How connections are encrypted.

    Attributes:
        context: asked for each connection, so that a renewed certificate is used from then on.
        told_apart: the first byte says whether a peer speaks TLS, so that one which does not can be answered.
    """

    context: Callable[[], ssl.SSLContext]
    told_apart: bool = False


class Connections:
    """All connections of ``server``; used on one event loop.

    Args:
        server: makes the protocol for each connection; its handler must answer through :meth:`answer`.
        seldom: receives lines about connections that were cut off, at most one a minute of each kind.
        clock: replaced in tests.
    """

    def __init__(
        self,
        server: web.Server,
        limits: Limits,
        seldom: Seldom,
        tls: Tls | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        #: bytes of the answers that are being written
        self.unsent_nbytes = 0
        self._server = server
        self._seldom = seldom
        self._tls = tls
        self._clock = clock
        # Each in the order of entry, so the first is the one that has waited longest.
        self._in: dict[Phase, dict[Connection, float]] = {phase: {} for phase in Phase}
        self._by_protocol: dict[asyncio.BaseProtocol, Connection] = {}
        self._opening: dict[Connection, asyncio.Task[None]] = {}
        self._tick_s = min(1.0, min(map(limits.of, Phase)) / 4)
        self._ticking: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._in.values()))

    def count(self, *phases: Phase) -> int:
        """Connections in any of ``phases``."""
        return sum(len(self._in[phase]) for phase in phases)

    # --- one connection from its beginning -----------------------------------------------------------------------

    def accepted(self, sock: socket.socket) -> None:
        """Take ``sock`` as a new connection, or close it if there is no room and nobody who can make room."""
        if len(self) >= self.limits.connections and not self._make_room():
            sock.close()
            return
        connection = Connection(self, self._server())
        self._enter(connection, Phase.OPENING)
        task = asyncio.get_running_loop().create_task(self._open(connection, sock))
        self._opening[connection] = task
        task.add_done_callback(lambda _: self._opening.pop(connection, None))
        if self._ticking is None:
            self._ticking = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    async def _open(self, connection: Connection, sock: socket.socket) -> None:
        """See what the peer speaks, shake hands, and begin to read."""
        loop = asyncio.get_running_loop()
        handed_over = False
        try:
            encrypted = self._tls is not None and (not self._tls.told_apart or await _begins_tls(sock))
            context = self._tls.context() if self._tls is not None and encrypted else None
            handed_over = True  # from here on the socket is the transport's to close
            await loop.connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=context,
                ssl_handshake_timeout=self.limits.opening_s if encrypted else None,
            )
        except (
            OSError,
            asyncio.TimeoutError,
        ):  # a peer that gave up, or does not speak TLS; ssl.SSLError is an OSError
            pass
        finally:
            if not handed_over:
                sock.close()
            if not connection.made:
                self._leave(connection)

    async def answer(
        self,
        request: web.BaseRequest,
        make: Callable[[web.BaseRequest], Awaitable[web.StreamResponse | Reply]],
        phase: Phase = Phase.ANSWER,
    ) -> web.StreamResponse:
        """Let ``make`` decide about ``request``, and return once the peer has taken the answer.

        Raises:
            ConnectionError: the peer has gone, or was cut off.
        """
        connection = self._by_protocol.get(request.protocol)
        if connection is None:  # it broke off meanwhile; aiohttp finds out as it writes
            return web.Response()
        connection.path = request.path
        self._enter(connection, phase)
        made = await make(request)
        self._enter(connection, Phase.WRITE)
        response = await self._written(request, made, connection)
        await connection.taken()
        if not connection.lost:
            connection.begin_request()
            self._enter(connection, Phase.IDLE)
        return response

    async def _written(
        self, request: web.BaseRequest, made: web.StreamResponse | Reply, connection: Connection
    ) -> web.StreamResponse:
        if isinstance(made, web.Response) and isinstance(made.body, bytes) and len(made.body) > _CHUNK_NBYTES:
            made = Reply(made.status, made.body, made.headers)
        if isinstance(made, web.StreamResponse):  # small, or its handler has written it
            await made.prepare(request)
            await made.write_eof()
            return made
        self.unsent_nbytes += len(made.body)
        try:
            return await _write(request, made, connection)
        finally:
            self.unsent_nbytes -= len(made.body)

    # --- the end of connections ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Cut off every connection."""
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None
        tasks = list(self._opening.values())
        for phase in Phase:
            for connection in list(self._in[phase]):
                self._cut(connection)
        if tasks:
            await asyncio.wait(tasks)

    def _make_room(self) -> bool:
        """Cut off the connection that has waited longest for its peer. False if none waits for its peer."""
        waiting = [next(iter(each.items())) for phase in _PEERS_TURN if (each := self._in[phase])]
        if not waiting:
            self._seldom.warning(
                "full", "a connection was refused: %d are open, and all of them are being answered", len(self)
            )
            return False
        self._seldom.warning("room", "%d connections are open: one that waited was closed for a new one", len(self))
        self._cut(min(waiting, key=lambda pair: pair[1])[0])
        return True

    def _tick(self) -> None:
        now = self._clock()
        for phase, connections in self._in.items():
            overdue = now - self.limits.of(phase)
            for connection in [each for each in _until(connections, overdue)]:
                if phase in (Phase.ANSWER, Phase.HELD):
                    text = "a call of %r was ended: it took longer than %g s"
                    self._seldom.warning("slow", text, connection.path[:200], self.limits.of(phase))
                self._cut(connection)
        again = len(self) > 0
        self._ticking = asyncio.get_running_loop().call_later(self._tick_s, self._tick) if again else None

    def _cut(self, connection: Connection) -> None:
        self._leave(connection)
        if connection.made:
            connection.abort()
        elif (task := self._opening.get(connection)) is not None:
            task.cancel()

    def _enter(self, connection: Connection, phase: Phase) -> None:
        if connection.lost:
            return
        self._leave(connection)
        connection.phase = phase
        self._in[phase][connection] = self._clock()

    def _leave(self, connection: Connection) -> None:
        if connection.phase is not None:
            self._in[connection.phase].pop(connection, None)

    # --- what connections report ---------------------------------------------------------------------------------

    def began(self, connection: Connection, protocol: asyncio.BaseProtocol) -> None:
        """``connection`` is open, and its request may come."""
        self._by_protocol[protocol] = connection
        self._enter(connection, Phase.HEAD)

    def asks_again(self, connection: Connection) -> None:
        """``connection``, which was idle, has begun to send another request."""
        self._enter(connection, Phase.HEAD)

    def detached(self, protocol: asyncio.BaseProtocol) -> None:
        """The connection of ``protocol`` has left the HTTP server."""
        self._by_protocol.pop(protocol, None)

    def ended(self, connection: Connection, protocol: asyncio.BaseProtocol) -> None:
        """``connection`` is closed."""
        self._by_protocol.pop(protocol, None)
        self._leave(connection)


#: Phases in which a connection waits for its peer, and can be closed for another.
_PEERS_TURN = (Phase.OPENING, Phase.HEAD, Phase.IDLE, Phase.WRITE)


def _until(connections: Mapping[Connection, float], overdue: float) -> list[Connection]:
    found = []
    for connection, entered_at in connections.items():
        if entered_at > overdue:
            break
        found.append(connection)
    return found


@dataclass(frozen=True)
class Reply:
    """An answer. ``still_true`` is asked before each piece of the body; once it says no, the body breaks off."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    still_true: Callable[[], bool] = lambda: True
    #: The connection ends with this answer.
    last: bool = False


async def _write(request: web.BaseRequest, reply: Reply, connection: Connection) -> web.StreamResponse:
    """Write ``reply`` as the peer takes it."""
    response = web.StreamResponse(status=reply.status, headers=reply.headers)
    response.content_length = len(reply.body)
    if reply.last:
        response.force_close()
    await response.prepare(request)
    view = memoryview(reply.body if request.method != "HEAD" else b"")
    for offset in range(0, len(view), _CHUNK_NBYTES):
        if not reply.still_true():
            connection.abort()
            return response
        # Returns once the peer has taken what went before: nobody can make this process hold copies.
        await response.write(view[offset : offset + _CHUNK_NBYTES])
        await connection.taken()
    await response.write_eof()
    return response


async def _begins_tls(sock: socket.socket) -> bool:
    """Whether the peer begins with TLS; what it sent stays where it is."""
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
            readable.clear()  # it was not there after all


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
    __slots__ = ("_inner", "_owner", "_received_nbytes", "_taken", "_transport", "lost", "made", "path", "phase")

    def __init__(self, owner: Connections, inner: asyncio.Protocol) -> None:
        self.phase: Phase | None = None
        self.made = False
        self.lost = False
        self.path = ""
        self._owner = owner
        self._inner = inner
        self._transport: asyncio.Transport | None = None
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
        self._transport.set_write_buffer_limits(high=1, low=0)  # 0 would pause TLS for ever
        self.made = True
        self._owner.began(self, self._inner)
        self._inner.connection_made(transport)

    def begin_request(self) -> None:
        """What is received from now on belongs to another request."""
        self._received_nbytes = 0

    def data_received(self, data: bytes) -> None:
        """Pass ``data`` on, unless it is more than a request may have."""
        if self.lost:
            return
        if self.phase is Phase.IDLE:
            self._owner.asks_again(self)
        self._received_nbytes += len(data)
        if self._received_nbytes > self._owner.limits.request_nbytes:
            self.abort()
            return
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass it on."""
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
        """The end, for everybody who waits on this connection."""
        self.lost = True
        self._owner.ended(self, self._inner)
        self._release()
        self._inner.connection_lost(exc)

    def abort(self) -> None:
        """Close the connection at once, whatever is still to be written."""
        if self._transport is not None:
            self._transport.abort()

    def _release(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None and not taken.done():
            taken.set_result(None)
