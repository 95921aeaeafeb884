"""An HTTP server for small GET services, bounded in connections, bytes, and time.

It runs inside a worker that serves a model, so callers must not be able to occupy memory, descriptors or the event
loop: one request per connection, no request bodies, a deadline for each phase of a connection, and an answer that is
written piece by piece as the caller reads it (:mod:`vllm_rfork.net.connections`). With a certificate, the first byte
of a connection shows whether the caller uses TLS; one that does not gets a text in plain HTTP.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.net import connection, connections, descriptors, listener
from vllm_rfork.net.connection import Limits, Phase
from vllm_rfork.net.connections import ConnectionLimiter
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.seldom import Seldom, SeldomFilter
from vllm_rfork.net.streams import BrokenStreamError, Stream

logger = worker_logger(__name__)
#: aiohttp writes a traceback for every malformed request; a port scan must not fill a worker's log.
_quiet = worker_logger(__name__ + ".requests")
_quiet.setLevel(logging.CRITICAL + 1)
#: Tracebacks of failed requests, one a minute of a kind.
failure_logger = worker_logger(__name__ + ".failures")
failure_logger.addFilter(SeldomFilter())

#: Connections per request answered at once; connections without a request cost little.
_OPEN_PER_ANSWER = 4
#: Share of a worker's spare descriptors that its callers may use.
_SHARE = 0.25


@dataclass(frozen=True)
class Bounds:
    """Limits of a server. Times in seconds, sizes in bytes.

    Attributes:
        max_connections: requests answered at once; more get 503. Four times as many connections may be open, fewer if
            the process is short of descriptors; the one that has been idle longest is closed for a new one.
        head_timeout_s: from connecting, and TLS, to the end of the request's head.
        answer_timeout_s: from there to the answer, and again until its last byte is read.
        max_request_nbytes: everything that a connection may send.
        max_line_nbytes: the request line: a key of 2048 characters, percent-encoded, fits.
        max_header_nbytes: one header.
    """

    max_connections: int = 64
    head_timeout_s: float = 5.0
    answer_timeout_s: float = 60.0
    max_request_nbytes: int = 64 * 1024
    max_line_nbytes: int = 32 * 1024
    max_header_nbytes: int = 8190

    def limits(self) -> Limits:
        """The same as limits of connections, reduced to what the process can open."""
        wanted = _OPEN_PER_ANSWER * self.max_connections
        return Limits(
            connections=descriptors.connections(wanted, kept=listener.KEPT, share=_SHARE),
            request_nbytes=self.max_request_nbytes,
            opening_s=self.head_timeout_s,
            head_s=self.head_timeout_s,
            answer_s=self.answer_timeout_s,
            write_s=self.answer_timeout_s,
            idle_s=self.head_timeout_s,
        )


@dataclass(frozen=True)
class Reply:
    """An answer. ``still_true`` is called before each piece of the body; once it returns False, the body breaks off."""

    status: int
    body: bytes | str
    content_type: str = "text/plain"
    headers: tuple[tuple[str, str], ...] = ()
    still_true: Callable[[], bool] = lambda: True
    #: Instead of ``body``; ``content_type`` is then that of bytes. Its ``ended`` is called in any case.
    stream: Stream | None = None


Handler = Callable[[web.BaseRequest], Awaitable[Reply]]


@dataclass(frozen=True)
class Tls:
    """Encryption of a server's connections.

    Attributes:
        context: called for each connection, so that a renewed certificate is used from then on.
        plain_too: callers in plain HTTP are answered as well; otherwise they get 426.
        wants_certificate: callers without a certificate get 403. The context must request and verify certificates,
            but must not end the handshake of a caller without one, who would get no explanation.
    """

    context: Callable[[], ssl.SSLContext]
    plain_too: bool = False
    wants_certificate: bool = False


def tls_for(credentials: Credentials) -> Tls | None:
    """The encryption that the ``seed_tls`` of ``credentials`` demands of a worker's service; None for none."""
    options = credentials.options
    if options.seed_tls == "off":
        return None
    return Tls(
        credentials.needed_server_context,
        plain_too=options.seed_tls == "prefer",
        wants_certificate=bool(options.client_ca_file),
    )


class BoundedServer:
    """Serves ``handler`` on one listening socket; made, started and stopped on one event loop."""

    def __init__(self, handler: Handler, bounds: Bounds, tls: Tls | None = None) -> None:
        self._handler = handler
        self._bounds = bounds
        self._tls = tls
        self._seldom = Seldom(logger)
        self._http: web.Server | None = None
        self._listener: listener.Listener | None = None
        #: None while the server does not listen.
        self.connections: ConnectionLimiter | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on ``host``; ``port`` 0 takes a free one. Returns the port.

        Raises:
            OSError: the name does not resolve, or the address cannot be used.
        """
        # One address only: each address of a name would get another random port.
        sockets = await listener.listen(host, port, backlog=_OPEN_PER_ANSWER * self._bounds.max_connections)
        self._http = web.Server(
            self._answer,
            access_log=None,
            logger=_quiet,
            max_line_size=self._bounds.max_line_nbytes,
            max_field_size=self._bounds.max_header_nbytes,
            lingering_time=1.0,
        )
        tls = None if self._tls is None else connections.Tls(self._tls.context, told_apart=True)
        self.connections = ConnectionLimiter(self._http, self._bounds.limits(), self._seldom, tls)
        self._listener = listener.Listener(sockets, self.connections.accepted, self._seldom)
        return self._listener.port

    async def stop(self) -> None:
        """Stop listening and drop every connection. Stopping twice does nothing."""
        listening, self._listener = self._listener, None
        http, self._http = self._http, None
        opened, self.connections = self.connections, None
        if listening is not None:
            listening.close()
        if opened is not None:
            await opened.close()
        if http is not None:
            await http.shutdown(timeout=1.0)

    # --- answers -------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.connections is None:
            raise ConnectionResetError("the service has stopped")
        try:
            return await self.connections.answer(request, self._encoded)
        except BrokenStreamError as error:
            failure_logger.warning("an answer to %s broke off: %s", request.path[:200], error)
            raise ConnectionResetError("the answer broke off") from error

    async def _encoded(self, request: web.BaseRequest) -> connection.Reply:
        reply = await self._reply(request)
        body = reply.body.encode() if isinstance(reply.body, str) else reply.body
        charset = "; charset=utf-8" if reply.stream is None else ""
        headers = {**dict(reply.headers), "Content-Type": f"{reply.content_type}{charset}"}
        return connection.Reply(reply.status, body, headers, reply.still_true, reply.stream, last=True)

    async def _reply(self, request: web.BaseRequest) -> Reply:
        if self._tls is not None and (refusal := _refused(self._tls, request)):
            return refusal
        if request.method not in ("GET", "HEAD"):
            return Reply(405, "this service answers GET only", headers=(("Allow", "GET, HEAD"),))
        if request.body_exists:
            return Reply(413, "this service takes no request body")
        if self.connections is not None:
            answered = self.connections.count(Phase.ANSWER, Phase.WRITE)
            if answered > self._bounds.max_connections:
                return Reply(503, "too many callers at once; try again", headers=(("Retry-After", "1"),))
        try:
            return await self._handler(request)
        except Exception:
            failure_logger.exception("a request for %s failed", request.path[:200])
            return Reply(500, "internal error")


def _refused(tls: Tls, request: web.BaseRequest) -> Reply | None:
    """The refusal of a connection that ``tls`` does not permit, or None."""
    ssl_object = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    if ssl_object is None:
        refusal = Reply(426, "this service serves https only", headers=(("Upgrade", "TLS/1.2, HTTP/1.1"),))
        return None if tls.plain_too else refusal
    if tls.wants_certificate and not ssl_object.getpeercert(binary_form=True):
        return Reply(403, "this service demands a client certificate (rfork_tls_cert_file)")
    return None
