"""Listening sockets, and a loop that accepts connections without flooding the log or using up the descriptors.

asyncio's own servers log a traceback for each connection that they cannot accept: 86 MB in 50 s without descriptors.
This one pauses and logs one line a minute.
"""

from __future__ import annotations

import asyncio
import os
import socket
import weakref
from collections.abc import Callable

from vllm_rfork.net import descriptors
from vllm_rfork.net.seldom import Seldom

#: Pause after a failed accept, most likely for lack of descriptors, in seconds.
PAUSE_S = 1.0
#: Connections accepted in a row before the event loop continues with other work.
_BATCH = 16
#: Descriptors reserved for the rest of the process. The kernel assigns the lowest free number: a connection that gets
#: one of the last is closed at once.
KEPT = 32


class Listener:
    """Accepts connections from sockets and passes each to ``accepted``, non-blocking.

    Args:
        accepted: owns the connection from then on; must not raise.
        seldom: receives a line if accepting fails.
    """

    def __init__(self, sockets: list[socket.socket], accepted: Callable[[socket.socket], None], seldom: Seldom) -> None:
        self._sockets = sockets
        self._accepted = accepted
        self._seldom = seldom
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        self._loop = asyncio.get_running_loop()
        _open.update(sockets)
        for each in sockets:
            self._loop.add_reader(each, self._accept, each)

    @property
    def port(self) -> int:
        """The port of the first socket."""
        return int(self._sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop listening. Closing twice does nothing."""
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()
        for each in self._sockets:
            if each.fileno() >= 0:
                self._loop.remove_reader(each)
            _open.discard(each)
            each.close()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_BATCH):
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(listening, error)
                return
            if connection.fileno() >= descriptors.limit() - KEPT:
                connection.close()
                self._seldom.warning(
                    "descriptors",
                    "a connection was closed because this process may have %d open files only: raise ulimit -n",
                    descriptors.limit(),
                )
                continue
            connection.setblocking(False)
            self._accepted(connection)

    def _pause(self, listening: socket.socket, error: OSError) -> None:
        self._seldom.warning(
            "accept",
            "no connection is accepted for %g s because of: %s; open files are limited to %d (ulimit -n)",
            PAUSE_S,
            error,
            descriptors.limit(),
        )
        self._loop.remove_reader(listening)
        self._pauses[listening] = self._loop.call_later(PAUSE_S, self._resume, listening)

    def _resume(self, listening: socket.socket) -> None:
        del self._pauses[listening]
        self._loop.add_reader(listening, self._accept, listening)


async def listen(
    host: str, port: int, *, backlog: int, every_address: bool = False, sent_nbytes: int = 0
) -> list[socket.socket]:
    """Sockets that listen on ``host``: the first of its addresses, or each of them.

    Args:
        port: 0 takes a free one, and then the first address alone.
        sent_nbytes: the kernel's send buffer for each connection; 0: its default, which is megabytes.

    Raises:
        OSError: the name does not resolve, or an address cannot be used.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:
        raise OSError(f"not a host name: {host!r}") from error
    if port == 0 or not every_address:
        del found[1:]
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            each = socket.socket(family, kind, protocol)
            sockets.append(each)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and every_address:
                each.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if sent_nbytes:  # accepted connections inherit it
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, sent_nbytes)
            each.bind(address)
            each.setblocking(False)
            each.listen(backlog)
    except BaseException:
        for each in sockets:
            each.close()
        raise
    return sockets


_open: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child that kept a listener would let the port accept, and never answer, after the parent's death."""
    for each in list(_open):
        each.close()
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)
