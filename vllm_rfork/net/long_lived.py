"""Sockets for presence connections, which show the other side that this process lives.

The kernel checks that the other host exists. A forked child closes its copy, which would hide its parent's death.
"""

from __future__ import annotations

import os
import socket
import weakref
from typing import Any

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
#: A host that vanishes is noticed after 20 seconds without a byte. The kernel does not probe a connection on which
#: something was sent and not acknowledged, and would repeat that for a quarter of an hour: hence the last option, in
#: milliseconds, from the first such byte. Not every platform has these options.
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000))


def probe_host(connection: socket.socket) -> None:
    """Have the kernel check that the other host exists. A stopped process does not matter: its kernel answers.

    Raises:
        OSError: the socket is closed, or is not of TCP.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def long_lived_socket(found: tuple[Any, ...]) -> socket.socket:
    """A socket for an entry of ``getaddrinfo``. Raises OSError."""
    family, kind, protocol, *_ = found
    made = socket.socket(family, kind, protocol)
    try:
        probe_host(made)
    except OSError:
        made.close()
        raise
    _sockets.add(made)
    return made


def _close_in_child() -> None:
    for each in list(_sockets):
        each.close()
    _sockets.clear()


os.register_at_fork(after_in_child=_close_in_child)
