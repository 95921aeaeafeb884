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
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from vllm_rfork.net.connection import CHUNK_NBYTES, Connection, Limits, Phase, Reply, begins_tls, write_reply
from vllm_rfork.net.seldom import Seldom


@dataclass(frozen=True)
class Tls:
    """Encryption of connections.

    Attributes:
        context: called for each connection, so that a renewed certificate is used from then on.
        told_apart: examine the first byte, so that a peer without TLS can be answered in plain HTTP.
    """

    context: Callable[[], ssl.SSLContext]
    told_apart: bool = False


class ConnectionLimiter:
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
        """Find out whether the peer uses TLS, shake hands, and begin to read."""
        loop = asyncio.get_running_loop()
        handed_over = False
        try:
            encrypted = self._tls is not None and (not self._tls.told_apart or await begins_tls(sock))
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
        if isinstance(made, web.Response) and isinstance(made.body, bytes) and len(made.body) > CHUNK_NBYTES:
            made = Reply(made.status, made.body, made.headers)
        if isinstance(made, web.StreamResponse):  # small, or its handler has written it
            await made.prepare(request)
            await made.write_eof()
            return made
        self.unsent_nbytes += len(made.body)
        try:
            return await write_reply(request, made, connection)
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

    def request_seen(self, connection: Connection) -> None:
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
