"""Plain sockets for tests of servers: what a well-behaved HTTP client does not do."""

from __future__ import annotations

import asyncio
import contextlib
import socket


async def read_all(sock: socket.socket) -> bytes:
    """What the other side sends until it closes or resets the connection."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), 30):
            received += chunk
    return bytes(received)
