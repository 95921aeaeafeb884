"""Connections: how many there may be, and how long one may stay without asking for anything.

aiohttp closes idle connections between requests; the time until a connection's first request is bounded here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from aiohttp import web

#: A whole request must have arrived so many seconds after the connection was made.
FIRST_REQUEST_S = 20.0


class Door:
    """Hands out protocols of ``web_server``; at most ``max_connections`` at once."""

    def __init__(
        self, web_server: web.Server, max_connections: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._web_server = web_server
        self._max_connections = max_connections
        self._clock = clock
        self._silent: dict[asyncio.BaseProtocol, float] = {}

    def open(self) -> asyncio.Protocol:
        """A protocol for a new connection; one that closes at once where there are too many."""
        if len(self._web_server.connections) >= self._max_connections:
            return _Full()
        protocol = self._web_server()
        self._silent[protocol] = self._clock()
        return protocol

    def has_spoken(self, request: web.BaseRequest) -> None:
        """The connection of ``request`` has sent one."""
        self._silent.pop(request.protocol, None)

    def sweep(self) -> None:
        """Close connections that have been silent for too long."""
        overdue = self._clock() - FIRST_REQUEST_S
        for protocol, opened_at in list(self._silent.items()):
            if opened_at > overdue:
                break  # in order of opening
            del self._silent[protocol]
            if isinstance(protocol, web.RequestHandler):
                protocol.force_close()


class _Full(asyncio.Protocol):
    """Too many connections: close this one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
