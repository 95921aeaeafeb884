"""The control connection: frames over TCP that only the two owners of a secret can write.

Both sides prove that they have the secret (HMAC-SHA256 over two nonces). Each frame then carries a MAC over its number
and its body, with a key for each direction. Nothing is encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Sequence

SECRET_NBYTES = 32
#: Bytes of the largest frame: 8192 segments of 40 characters.
MAX_FRAME_NBYTES = 512 * 1024
_GREETING = b"rfork-collective-1"
_NONCE_NBYTES = 16
_MAC_NBYTES = 32
_LENGTH = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")
#: How long a call waits in all while it moves bytes without a MAC, in seconds, as ``struct timeval``.
_TICK = struct.pack("@ll", 1, 0)


class Lost(Exception):
    """The control connection is of no use any more.

    Attributes:
        late: the deadline has passed.
    """

    def __init__(self, text: str, *, late: bool = False) -> None:
        super().__init__(text)
        self.late = late


class Channel:
    """A connection whose two ends have proved that they have the secret. One thread at a time.

    Args:
        sock: owned by the channel from now on.
        outgoing, incoming: the keys of the two directions.
    """

    def __init__(self, sock: socket.socket, outgoing: bytes, incoming: bytes) -> None:
        self._socket = sock
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, _TICK)
        self._keys = {True: outgoing, False: incoming}
        self._numbers = {True: 0, False: 0}

    @property
    def local_host(self) -> str:
        """The address of this end: the one through which the peer is reached."""
        return str(self._socket.getsockname()[0])

    @property
    def peer_host(self) -> str:
        """The address of the other end."""
        return str(self._socket.getpeername()[0])

    def send(self, body: bytes, deadline: float) -> None:
        """Send one frame.

        Raises:
            Lost: the peer is gone, or does not take it in time.
        """
        if len(body) > MAX_FRAME_NBYTES:
            raise Lost(f"a frame of {len(body)} bytes is too large")
        _send(self._socket, _LENGTH.pack(len(body)) + body + self._mac(body, outgoing=True), deadline)

    def receive(self, deadline: float) -> bytes:
        """The body of the next frame.

        Raises:
            Lost: the peer is gone or too slow, or the frame is too large or not the peer's.
        """
        (nbytes,) = _LENGTH.unpack(_receive(self._socket, _LENGTH.size, deadline))
        if nbytes > MAX_FRAME_NBYTES:
            raise Lost(f"the peer announces a frame of {nbytes} bytes")
        body = _receive(self._socket, nbytes, deadline)
        if not hmac.compare_digest(_receive(self._socket, _MAC_NBYTES, deadline), self._mac(body, outgoing=False)):
            raise Lost("a frame was changed on its way")
        return body

    def send_some(self, buffers: Sequence[memoryview]) -> int:
        """Send bytes of ``buffers`` between two frames, without a MAC, as many as leave within a second or so.

        Returns:
            Their number, 0 if the peer takes none.

        Raises:
            Lost: the peer is gone.
        """
        self._socket.settimeout(None)  # so that the system moves all in one call, without Python's lock
        try:
            return self._socket.sendmsg(buffers)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Lost(f"the peer is gone: {error}") from error

    def receive_some(self, buffers: Sequence[memoryview]) -> int:
        """Receive bytes between two frames into ``buffers``, as many as arrive within a second or so.

        Returns:
            Their number, 0 if none arrives.

        Raises:
            Lost: the peer is gone.
        """
        self._socket.settimeout(None)
        try:
            nbytes = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Lost(f"the peer is gone: {error}") from error
        if not nbytes:
            raise Lost("the peer has closed the connection")
        return nbytes

    def interrupt(self) -> None:
        """End the connection; a call in another thread fails at once. :meth:`close` frees the descriptor."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was faster

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._socket.close()

    def _mac(self, body: bytes, *, outgoing: bool) -> bytes:
        number = self._numbers[outgoing]
        self._numbers[outgoing] = number + 1
        return _hmac(self._keys[outgoing], _NUMBER.pack(number), body)


def connect(host: str, port: int, secret: bytes, deadline: float) -> Channel:
    """Connect to a seed.

    Raises:
        Lost: it cannot be reached in time, or does not have the secret.
    """
    try:
        sock = socket.create_connection((host, port), timeout=_left_s(deadline))
    except (OSError, UnicodeError, OverflowError) as error:
        raise Lost(f"no connection to {host}:{port}: {error}") from error
    try:
        _no_delay(sock)
        greeting = _receive(sock, len(_GREETING) + _NONCE_NBYTES, deadline)
        if not greeting.startswith(_GREETING):
            raise Lost(f"the process at {host}:{port} is not an engine of this kind")
        ours, theirs = secrets.token_bytes(_NONCE_NBYTES), greeting[len(_GREETING) :]
        _send(sock, ours + _hmac(secret, b"receiver", theirs, ours), deadline)
        proof = _receive(sock, _MAC_NBYTES, deadline)
        if not hmac.compare_digest(proof, _hmac(secret, b"seed", theirs, ours)):
            raise Lost(f"the process at {host}:{port} does not have the seed's secret")
    except BaseException:
        sock.close()
        raise
    return Channel(sock, _hmac(secret, b"to the seed", theirs, ours), _hmac(secret, b"to the receiver", theirs, ours))


def accept(sock: socket.socket, secret: bytes, deadline: float) -> Channel:
    """The channel of a connection that the seed has accepted; does not close ``sock`` if that fails.

    Raises:
        Lost: the peer does not have the secret, is gone, or too slow.
    """
    _no_delay(sock)
    ours = secrets.token_bytes(_NONCE_NBYTES)
    _send(sock, _GREETING + ours, deadline)
    answer = _receive(sock, _NONCE_NBYTES + _MAC_NBYTES, deadline)
    theirs, proof = answer[:_NONCE_NBYTES], answer[_NONCE_NBYTES:]
    if not hmac.compare_digest(proof, _hmac(secret, b"receiver", ours, theirs)):
        raise Lost("the peer does not have the secret")
    _send(sock, _hmac(secret, b"seed", ours, theirs), deadline)
    return Channel(sock, _hmac(secret, b"to the receiver", ours, theirs), _hmac(secret, b"to the seed", ours, theirs))


def _hmac(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(parts), hashlib.sha256).digest()


def _no_delay(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _left_s(deadline: float) -> float:
    """Seconds until the deadline. Raises Lost if it has passed."""
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise Lost("the peer does not answer in time", late=True)
    return left_s


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    try:
        sock.settimeout(_left_s(deadline))
        sock.sendall(data)
    except TimeoutError as error:
        raise Lost("the peer does not take a message in time", late=True) from error
    except OSError as error:
        raise Lost(f"the peer is gone: {error}") from error


def _receive(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    parts = []
    while nbytes:
        try:
            sock.settimeout(_left_s(deadline))
            part = sock.recv(min(nbytes, 65536))
        except TimeoutError as error:
            raise Lost("the peer does not answer in time", late=True) from error
        except OSError as error:
            raise Lost(f"the peer is gone: {error}") from error
        if not part:
            raise Lost("the peer has closed the connection")
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)
