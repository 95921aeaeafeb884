"""Groups of two over their control connection, for host memory.

The bytes of a batch follow the message that announces them, in the connection whose ends have proved that they have
the secret. So there is no second port that a stranger could reach, and nothing parses what arrives: the receiver takes
as many bytes as it has requested. Like those of every lane they carry no MAC; the fork's digests notice changes.

One call of the system moves many pieces from or to where they are, without Python's lock, which inference needs. When
it has returned, nothing touches the memory.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from vllm_rfork.engines.collective.channel import Channel, Lost
from vllm_rfork.engines.collective.group import STALL_S, Backend, Group, GroupFailed
from vllm_rfork.engines.collective.plan import CALL_PIECES, Piece, parts


class TcpBackend(Backend):
    """TCP needs nothing that lasts longer than a group."""

    name: ClassVar[str] = "tcp"
    captures: ClassVar[bool] = False

    def __init__(self, index: int) -> None:
        pass

    def create(self, rank: int, channel: Channel, deadline: float) -> Group:
        """The control connection is the group."""
        return TcpGroup(channel)

    def close(self) -> None:
        """Nothing is open."""


class TcpGroup(Group):
    """See the module's docstring. The channel stays its owner's."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def send(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Send straight from the memory."""
        self._move(self._channel.send_some, pieces, deadline)

    def receive(self, pieces: Sequence[Piece], deadline: float) -> None:
        """Receive straight into the memory."""
        self._move(self._channel.receive_some, pieces, deadline)

    def abort(self) -> None:
        """End the connection."""
        self._channel.interrupt()

    def close(self) -> None:
        """End the connection. No call is under way, so nothing touches the memory."""
        self._channel.interrupt()

    def _move(self, some: Callable[[Sequence[memoryview]], int], pieces: Sequence[Piece], deadline: float) -> None:
        """Call ``some`` until every byte has moved.

        Raises:
            GroupFailed: the connection is gone, no byte has moved for ``STALL_S`` seconds, or ``deadline`` has passed.
        """
        moved_at = time.monotonic()
        for part in parts(pieces, CALL_PIECES):
            left = [_memory(piece) for piece in part]
            while left:
                try:
                    nbytes = some(left)
                except Lost as error:
                    raise GroupFailed(str(error)) from error
                now = time.monotonic()
                moved_at = now if nbytes else moved_at
                left = _after(left, nbytes)
                if left and now >= min(deadline, moved_at + STALL_S):
                    raise GroupFailed("the peer made no progress in time", late=True)


def _memory(piece: Piece) -> memoryview:
    """The bytes of ``piece``, without a copy."""
    return memoryview((ctypes.c_ubyte * piece.nbytes).from_address(piece.address)).cast("B")


def _after(buffers: list[memoryview], nbytes: int) -> list[memoryview]:
    """``buffers`` without their first ``nbytes`` bytes."""
    for number, buffer in enumerate(buffers):
        if nbytes < len(buffer):
            return [buffer[nbytes:], *buffers[number + 1 :]]
        nbytes -= len(buffer)
    return []
