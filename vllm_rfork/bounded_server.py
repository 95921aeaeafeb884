"""An HTTP server for small GET services, bounded in connections, bytes, and time.

It lives inside a worker that serves a model, so whoever connects must not be able to hold memory, descriptors or
the event loop: one request per connection, no request bodies, a deadline for the request's head and one for the
answer, and an answer that is written piece by piece as the reader takes it. Where it has a certificate, the first byte
says whether a caller speaks TLS, so that one which does not is told so in words. Must not know any path of the
protocol.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from aiohttp import web

from vllm_rfork.worker_log import worker_logger

logger = worker_logger(__name__)
#: aiohttp writes a traceback for every malformed request; whoever scans ports must not fill a worker's log.
_quiet = worker_logger(__name__ + ".requests")
_quiet.setLevel(logging.CRITICAL + 1)

_CHUNK_NBYTES = 256 * 1024
#: What a TLS connection begins with: a record of type handshake.
_TLS_BEGINS = b"\x16"
#: After an accept that failed, for want of descriptors most likely.
_ACCEPT_PAUSE_S = 1.0


@dataclass(frozen=True)
class Bounds:
    """What a caller may take. Times in seconds, sizes in bytes.

    Attributes:
        max_connections: answered at once; more get 503, and beyond four times as many the connection is dropped.
        head_timeout_s: from connecting to the end of the request's head.
        answer_timeout_s: from there to the last byte of the answer.
        max_request_nbytes: all that a connection may send.
        max_line_nbytes: the request line: a key of 2048 characters, percent-encoded, fits.
        max_header_nbytes: one header.
    """

    max_connections: int = 64
    head_timeout_s: float = 5.0
    answer_timeout_s: float = 60.0
    max_request_nbytes: int = 64 * 1024
    max_line_nbytes: int = 32 * 1024
    max_header_nbytes: int = 8190


@dataclass(frozen=True)
class Reply:
    """An answer. ``still_true`` is asked before each piece of the body; once it says no, the body breaks off."""

    status: int
    body: bytes | str
    content_type: str = "text/plain"
    headers: tuple[tuple[str, str], ...] = ()
    still_true: Callable[[], bool] = lambda: True


Handler = Callable[[web.BaseRequest], Awaitable[Reply]]


@dataclass(frozen=True)
class Tls:
    """How connections are encrypted.

    Attributes:
        context: asked for each connection, so that a renewed certificate is used from then on.
        plain_too: callers that speak plain HTTP are answered as well; else they get 426.
        wants_certificate: callers that showed none get 403. The context must ask for it and check it, and not break
            the handshake off where there is none: that would tell the caller nothing.
    """

    context: Callable[[], ssl.SSLContext]
    plain_too: bool = False
    wants_certificate: bool = False


class BoundedServer:
    """Serves ``handler`` on one listening socket; made, started and stopped on one event loop."""

    def __init__(self, handler: Handler, bounds: Bounds, tls: Tls | None = None) -> None:
        self._handler = handler
        self._bounds = bounds
        self._tls = tls
        self._accepting: asyncio.Task[None] | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._connections: dict[asyncio.BaseTransport, _Connection] = {}
        self._http: web.Server | None = None
        self._server: asyncio.AbstractServer | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on ``host``; ``port`` 0 takes a free one. Returns the port.

        Raises:
            OSError: the name does not resolve, or the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        # One address only: listening on each that a name has would get a random port for each.
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.setblocking(False)
            http = web.Server(
                self._answer,
                access_log=None,
                logger=_quiet,
                max_line_size=self._bounds.max_line_nbytes,
                max_field_size=self._bounds.max_header_nbytes,
                lingering_time=1.0,
            )
            if self._tls is None:
                self._server = await loop.create_server(lambda: self._connection(http), sock=listener)
            else:
                listener.listen(self._bounds.max_connections)
                self._accepting = asyncio.create_task(self._accept_for_ever(listener, http, self._tls))
            self._http = http
        except BaseException:
            listener.close()
            raise
        _listeners.add(listener)
        return int(listener.getsockname()[1])

    async def stop(self) -> None:
        """Stop listening and drop every connection. Stopping twice does nothing."""
        server, self._server = self._server, None
        http, self._http = self._http, None
        accepting, self._accepting = self._accepting, None
        if server is not None:
            server.close()
        if accepting is not None:
            opening = {accepting, *self._opening}
            for task in opening:
                task.cancel()
            await asyncio.wait(opening)
        for connection in list(self._connections.values()):
            connection.drop("the service stops")
        if http is not None:
            await http.shutdown(timeout=1.0)
        if server is not None:
            await server.wait_closed()

    def _connection(self, http: web.Server) -> _Connection:
        return _Connection(self._connections, self._bounds, http())

    # --- with TLS ------------------------------------------------------------------------------------------------

    async def _accept_for_ever(self, listener: socket.socket, http: web.Server, tls: Tls) -> None:
        """Take connections one by one; what follows is done beside, within its own bounds."""
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:
                    logger.warning("the service takes no connection for a moment: %s", error)
                    await asyncio.sleep(_ACCEPT_PAUSE_S)
                    continue
                if len(self._opening) + len(self._connections) >= 4 * self._bounds.max_connections:
                    connection.close()
                    continue
                opening = asyncio.create_task(self._open(connection, http, tls))
                self._opening.add(opening)
                opening.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket, http: web.Server, tls: Tls) -> None:
        """See what the caller speaks, shake hands, and hand the connection over."""
        loop = asyncio.get_running_loop()
        timeout_s = self._bounds.head_timeout_s
        try:
            encrypted = await asyncio.wait_for(_begins_tls(connection), timeout_s)
        except BaseException as error:
            connection.close()
            if isinstance(error, (OSError, asyncio.TimeoutError)):
                logger.debug("a connection came to nothing: %s: %s", type(error).__name__, error)
                return
            raise
        # From here on the socket is the transport's to close.
        try:
            await loop.connect_accepted_socket(
                lambda: self._connection(http),
                connection,
                ssl=tls.context() if encrypted else None,
                ssl_handshake_timeout=timeout_s if encrypted else None,
            )
        except OSError as error:  # ssl.SSLError is one
            logger.debug("a connection came to nothing: %s: %s", type(error).__name__, error)

    # --- answers -------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = None if request.transport is None else self._connections.get(request.transport)
        if connection is None:  # it broke off meanwhile
            raise ConnectionResetError("the connection is gone")
        connection.head_complete()
        reply = await self._reply(request)
        body = reply.body.encode() if isinstance(reply.body, str) else reply.body
        response = web.StreamResponse(status=reply.status, headers=dict(reply.headers))
        response.content_type = reply.content_type
        response.charset = "utf-8"
        response.content_length = len(body)
        response.force_close()
        await response.prepare(request)
        view = memoryview(body)
        for offset in range(0, len(view), _CHUNK_NBYTES):
            if not reply.still_true():
                connection.drop("its answer is no longer true")
                break
            # Waits until the reader has taken what went before: nobody can make this process hold copies.
            await response.write(view[offset : offset + _CHUNK_NBYTES])
        else:
            await response.write_eof()
        return response

    async def _reply(self, request: web.BaseRequest) -> Reply:
        if self._tls is not None and (refusal := _refused(self._tls, request)):
            return refusal
        if request.method != "GET":
            return Reply(405, "this service answers GET only", headers=(("Allow", "GET"),))
        if request.body_exists:
            return Reply(413, "this service takes no request body")
        if len(self._connections) > self._bounds.max_connections:
            return Reply(503, "too many callers at once; try again", headers=(("Retry-After", "1"),))
        try:
            return await self._handler(request)
        except Exception:
            logger.exception("a request for %s failed", request.path[:200])
            return Reply(500, "internal error")


def _refused(tls: Tls, request: web.BaseRequest) -> Reply | None:
    """What a caller is told whose connection is not as ``tls`` wants it."""
    ssl_object = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    if ssl_object is None:
        told = Reply(426, "this service speaks https only", headers=(("Upgrade", "TLS/1.2, HTTP/1.1"),))
        return None if tls.plain_too else told
    if tls.wants_certificate and not ssl_object.getpeercert(binary_form=True):
        return Reply(403, "this service demands a client certificate (rfork_tls_cert_file)")
    return None


async def _begins_tls(connection: socket.socket) -> bool:
    """Whether the peer begins with TLS; what it sent stays where it is."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    while True:
        loop.add_reader(connection, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(connection)
        try:
            return connection.recv(1, socket.MSG_PEEK) == _TLS_BEGINS
        except BlockingIOError:
            readable.clear()  # it was not there after all


class _Connection(asyncio.Protocol):
    """Hands one connection through to aiohttp and cuts it where it leaves the bounds."""

    def __init__(
        self,
        connections: dict[asyncio.BaseTransport, _Connection],
        bounds: Bounds,
        inner: asyncio.Protocol,
    ) -> None:
        self._connections = connections
        self._bounds = bounds
        self._inner = inner
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._received_nbytes = 0
        self._connected_at = time.monotonic()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or drop the connection where there are far too many."""
        self._transport = cast(asyncio.Transport, transport)
        if len(self._connections) >= 4 * self._bounds.max_connections:
            self.drop("there are too many connections")
            return
        self._connections[transport] = self
        self._set_deadline(self._bounds.head_timeout_s)
        self._inner.connection_made(transport)

    def head_complete(self) -> None:
        """The request is there: from now on the bound is the answer's."""
        self._set_deadline(self._bounds.answer_timeout_s)

    def data_received(self, data: bytes) -> None:
        """Pass ``data`` on, unless it is more than a request may have."""
        if self._transport not in self._connections:
            return
        self._received_nbytes += len(data)
        if self._received_nbytes > self._bounds.max_request_nbytes:
            self.drop("it sent too much")
            return
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass it on."""
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        """Pass it on."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on."""
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the deadline; tell aiohttp where it ever heard of the connection."""
        if self._deadline is not None:
            self._deadline.cancel()
        if self._transport is not None and self._connections.pop(self._transport, None) is not None:
            self._inner.connection_lost(exc)

    def drop(self, reason: str) -> None:
        """Close the connection at once, whatever is still to be written."""
        if self._transport is not None:
            logger.debug("a connection is dropped after %.1f s: %s", time.monotonic() - self._connected_at, reason)
            self._transport.abort()

    def _set_deadline(self, after_s: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = asyncio.get_running_loop().call_later(after_s, self.drop, "it took too long")


_listeners: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child that kept the listener would let the port accept, and never answer, after the worker's death."""
    for listener in list(_listeners):
        listener.close()
    _listeners.clear()


os.register_at_fork(after_in_child=_close_in_child)
