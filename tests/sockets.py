"""Plain sockets for tests of servers: what a well-behaved HTTP client does not do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator


async def read_all(sock: socket.socket) -> bytes:
    """What the other side sends until it closes or resets the connection."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 65536), 30):
            received += chunk
    return bytes(received)


@contextlib.contextmanager
def deaf() -> Iterator[str]:
    """The URL of a listener that takes no connection: its queue is full, so further ones get no answer."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filling = sockets.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
