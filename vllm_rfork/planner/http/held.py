"""Held presence requests: one whose handler waits, and one whose answer comes in pieces.

The second is held by its connection alone, without the HTTP server's objects for it: that is 13 kB less for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from email.utils import formatdate

from vllm_rfork import messages
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.connection import Connection

#: Ways in which a held request ends: ask again, announce first, another process decides now, the planner stops.
AGAIN, UNKNOWN, LOST, LEAVE = "again", "unknown", "lost", "leave"
_SENT = {
    AGAIN: messages.PRESENCE_AGAIN,
    UNKNOWN: messages.PRESENCE_UNKNOWN,
    LOST: messages.PRESENCE_LATER,
    LEAVE: messages.PRESENCE_LATER,
}
#: nginx collects an answer before it passes it on, unless a header forbids it.
_HEAD = (
    "HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Type: text/plain\r\nCache-Control: no-store\r\n"
    "X-Accel-Buffering: no\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
_LAST_CHUNK = b"0\r\n\r\n"


class HeldRequest:
    """A request whose handler waits for :attr:`word`."""

    def __init__(self) -> None:
        self.word: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def end(self, word: str) -> None:
        """Let the handler answer. Ending twice does nothing."""
        if not self.word.done():
            self.word.set_result(word)


class HeldConnection:
    """A request that has left its handler: it gets a byte now and then, and a word at the end.

    Args:
        number: the store's, of this presence.
        ends_at: when it is answered, by the loop's clock.
        ended: called once, with this and the word, which is empty if the connection broke.
    """

    __slots__ = ("_connection", "_ended", "ends_at", "number", "seed")

    def __init__(
        self,
        connection: Connection,
        seed: SeedAddress,
        number: int,
        ends_at: float,
        ended: Callable[[HeldConnection, str], None],
    ) -> None:
        self.seed, self.number, self.ends_at = seed, number, ends_at
        self._connection = connection
        self._ended: Callable[[HeldConnection, str], None] | None = ended

    def begin(self) -> None:
        """Take the connection from the HTTP server, which cancels the handler, and begin the answer."""
        self._connection.detach(self._lost)
        self._connection.write(_HEAD.format(date=formatdate(usegmt=True)).encode())

    def beat(self) -> None:
        """Send a byte."""
        self._connection.write(_chunk("\n"))

    def end(self, word: str) -> None:
        """End the answer with ``word``. Ending twice does nothing."""
        if self._ended is not None:
            self._connection.write(_chunk(_SENT[word] + "\n") + _LAST_CHUNK, last=True)
            self._end(word)

    def _lost(self) -> None:
        self._end("")

    def _end(self, word: str) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(self, word)


def _chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()
