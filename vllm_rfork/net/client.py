"""One HTTP exchange, bounded in time and bytes, with every foreign error translated.

The other side may be anything: a planner behind a proxy, a half-open socket, another service altogether. So the client
follows no redirects, decodes no content encodings and keeps no connections or cookies, and only
:class:`~vllm_rfork.errors.ForkError` leaves this module. Connections are not reused: calls are minutes apart, and a
heartbeat on a connection that the other side has just closed would be lost, which costs more than a handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp.http import HttpProcessingError
from multidict import CIMultiDictProxy

from vllm_rfork.errors import ForkError
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.long_lived import long_lived_socket
from vllm_rfork.net.tls_errors import advice, ssl_error
from vllm_rfork.net.within import within

#: Longest quotation of the other side's text in a message, in characters.
MAX_QUOTED_LENGTH = 200
#: Timeout for the text of a refusal, in seconds: the text only explains the status.
_TEXT_TIMEOUT_S = 1.0
_MAX_TEXT_NBYTES = 4096
#: Longest time in seconds without a byte on a connection that the other side holds open. Planners that send none before
#: their answer, of earlier versions, answer within 50 s.
MAX_SILENCE_S = 75.0

#: Takes a piece of a body; it may raise errors of this package's tree.
Sink = Callable[[bytes], object]

#: Every error of aiohttp and the socket below it; ValueError for addresses and header values that it cannot send.
_FOREIGN = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
#: The SSL setting in aiohttp's messages, which is only the address of an object.
_SSL_SETTING = re.compile(r" ssl:(<[^>]*>|\w+)")


@dataclass(frozen=True)
class Answer:
    """The answer of ``url``. ``body`` is complete for a 200 whose body was requested, else the beginning of a text."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes
    url: str

    @property
    def text(self) -> str:
        """The body as one printable line, shortened, for use in a message."""
        words = "".join(c if c.isprintable() else " " for c in self.body.decode("utf-8", "replace")).split()
        line = " ".join(words)
        return line if len(line) <= MAX_QUOTED_LENGTH else line[: MAX_QUOTED_LENGTH - 1] + "…"

    def __str__(self) -> str:
        return f"HTTP {self.status}" + (f" ({self.text})" if self.body else "")


@dataclass(frozen=True)
class BoundedHttp:
    """Client of one kind of service.

    Args:
        service: name of the other side in messages, such as ``planner``.
        error: makes the error that a failed exchange raises.
        credentials: its token is sent as ``Authorization: Bearer`` and is never part of a message; its TLS is for
            ``https`` addresses.
    """

    service: str
    error: Callable[[str], ForkError]
    credentials: Credentials = field(default_factory=Credentials)

    async def exchange(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        max_body_nbytes: int = 0,
        sink: Sink | None = None,
        certified_name: str = "",
        connect_timeout_s: float | None = None,
    ) -> Answer:
        """Send one request and return its answer, whatever the status.

        The body of a 200 is read up to ``max_body_nbytes``, and not at all if that is 0. Of any other answer the
        beginning of the text is read.

        Args:
            sink: gets the body of a 200 piece by piece, never more than ``max_body_nbytes``, instead of the answer. An
                error that it raises ends the exchange and is raised here.
            certified_name: for ``https``, the name that the other side's certificate must contain instead of its host.
            connect_timeout_s: for a request that the other side holds open. It bounds name resolution and connecting,
                and :data:`MAX_SILENCE_S` bounds the time between two bytes. The kernel checks that the other host
                exists, and a forked child closes its copy of the connection, which would otherwise outlive this
                process.

        Raises:
            ForkError: made by ``error``; no answer within ``timeout_s`` seconds, no connection, an answer that is
                not HTTP, a body larger than ``max_body_nbytes`` or one that broke off.
        """
        what = f"{self.service} {without_credentials(url)}: {method}"
        sent = {"Accept-Encoding": "identity", "Connection": "close", **(headers or {})}
        if token := self.credentials.token:
            sent["Authorization"] = f"Bearer {token}"
        deadline = time.monotonic() + timeout_s
        exchange = self._exchange(
            method,
            url,
            sent,
            params,
            what=what,
            max_body_nbytes=max_body_nbytes,
            sink=sink,
            deadline=deadline,
            certified_name=certified_name,
            connect_timeout_s=connect_timeout_s,
        )
        try:
            # One clock for name resolution, connecting, headers and body; aiohttp's own timeouts are off.
            return await within(exchange, timeout_s)
        except asyncio.TimeoutError as error:
            if isinstance(error, aiohttp.SocketTimeoutError):
                raise self.error(f"{what} was silent for {MAX_SILENCE_S:g} s") from error
            if isinstance(error, aiohttp.ClientError):  # aiohttp's own bound, for connecting alone
                raise self.error(f"{what} could not connect within {connect_timeout_s or timeout_s:.3g} s") from error
            raise self.error(f"{what} got no answer within {timeout_s:.3g} s") from error
        except _FOREIGN as error:
            raise self.error(f"{what} failed: {self._cause(error, url)}") from error

    def _cause(self, error: Exception, url: str) -> str:
        # Some of aiohttp's errors quote the address, user and password included.
        reason = type(error).__name__ if "@" in url else _reason(error)
        clause = advice(
            error,
            tls=url.lower().startswith("https:"),
            shows_certificate=bool(self.credentials.options.cert_file),
            service=self.service,
        )
        return f"{reason}{clause}{_limit_of_files(error)}"

    async def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        params: Mapping[str, str] | None,
        *,
        what: str,
        max_body_nbytes: int,
        sink: Sink | None,
        deadline: float,
        certified_name: str,
        connect_timeout_s: float | None,
    ) -> Answer:
        session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(
                total=None,
                connect=connect_timeout_s,
                sock_connect=None,
                sock_read=None if connect_timeout_s is None else MAX_SILENCE_S,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            connector=_OneConnection(socket_factory=None if connect_timeout_s is None else long_lived_socket),
        )
        context = self.credentials.client_context()
        async with (
            session,
            session.request(
                method,
                url,
                headers=headers,
                params=params,
                allow_redirects=False,
                ssl=True if context is None else context,
                server_hostname=certified_name or None,
            ) as response,
        ):
            body = bytearray()
            if response.status != 200:
                # A text that stalls or breaks off must not hide the refusal itself.
                left_s = deadline - time.monotonic()
                with contextlib.suppress(asyncio.TimeoutError, *_FOREIGN):
                    await within(_read(response, body.extend, _MAX_TEXT_NBYTES), min(_TEXT_TIMEOUT_S, left_s / 2))
            elif max_body_nbytes and not await _read(response, sink or body.extend, max_body_nbytes):
                raise self.error(f"{what} answered with more than {max_body_nbytes} bytes")
            response.close()  # drops an unread rest together with the connection
            return Answer(response.status, response.headers, bytes(body), without_credentials(url))


class _OneConnection(aiohttp.TCPConnector):
    """Connector that connects once: aiohttp repeats a GET whose connection breaks, and could take a second lease."""

    _connected = False

    async def connect(self, *args: Any, **kwargs: Any) -> Any:
        if self._connected:
            raise aiohttp.ServerDisconnectedError("the connection broke off")
        self._connected = True
        return await super().connect(*args, **kwargs)


async def _read(response: aiohttp.ClientResponse, sink: Sink, max_nbytes: int) -> bool:
    """Pass the body to ``sink``, up to ``max_nbytes``. Returns False if it has more."""
    left_nbytes = max_nbytes
    async for chunk in response.content.iter_any():
        sink(chunk[:left_nbytes])
        left_nbytes -= len(chunk)
        if left_nbytes < 0:
            return False
    return True


def _limit_of_files(error: BaseException) -> str:
    """A clause about the limit of open files, if the exchange failed because of it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.EMFILE, errno.ENFILE):
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            return f"; this process may have {soft} open files (RLIMIT_NOFILE, ulimit -n): raise that limit"
        seen = seen.__cause__ or seen.__context__
    return ""


def _reason(error: BaseException) -> str:
    """The error in one line with its class."""
    text = " ".join(_SSL_SETTING.sub("", str(error)).split())
    name = type(error).__name__
    return f"{name}: {text[:MAX_QUOTED_LENGTH]}" if text else name


def went_away(error: ForkError) -> bool:
    """Return True if an exchange failed because the connection was refused or broke: it may work again soon."""
    cause = error.__cause__
    return isinstance(cause, (aiohttp.ClientConnectionError, OSError)) and ssl_error(cause) is None


def broke_off(error: ForkError) -> bool:
    """Return True if the connection broke after the request was sent, so that its effect is unknown."""
    cause = error.__cause__
    if isinstance(cause, aiohttp.ClientConnectorError):
        return False
    return isinstance(cause, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError))


def was_sent(error: ForkError) -> bool:
    """Return True if the request of a failed exchange may have arrived, that is, if there was a connection."""
    cause = error.__cause__
    if isinstance(cause, (aiohttp.ClientConnectorError, aiohttp.ClientConnectorCertificateError, aiohttp.InvalidURL)):
        return False
    return isinstance(cause, (aiohttp.ClientError, HttpProcessingError, OSError, asyncio.TimeoutError))


def without_credentials(url: str) -> str:
    """``url`` without user, password and query."""
    scheme, separator, rest = url.partition("://")
    rest = rest.partition("?")[0]
    authority, slash, path = rest.partition("/")
    return scheme + separator + authority.rpartition("@")[2] + slash + path
