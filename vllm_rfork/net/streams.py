"""Bodies that are read from a disk while the peer takes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from vllm_rfork.errors import RForkError
from vllm_rfork.threads.deadline import start_on_thread

T = TypeVar("T")


class BrokenStreamError(RForkError):
    """The bytes of a stream cannot be read, or are not as many as it has."""


@dataclass(frozen=True)
class Stream:
    """A body of ``nbytes`` bytes, of which one piece is in memory at a time.

    Attributes:
        pieces: begins to read. It may block, and raise OSError or errors of this package's tree.
        ended: called on the event loop when the answer has left or has broken off.
    """

    nbytes: int
    pieces: Callable[[], Iterator[bytes]]
    ended: Callable[[], object] = lambda: None

    async def read(self) -> AsyncGenerator[bytes, None]:
        """The pieces, which are ``nbytes`` bytes in all. Close the generator, which closes what it reads from.

        Raises:
            BrokenStreamError: see the class; nothing is returned of the piece that would be too much.
        """
        left_nbytes = self.nbytes
        source = await _on_thread(self.pieces)
        while (piece := await _on_thread(lambda: next(source, None))) is not None:
            left_nbytes -= len(piece)
            if left_nbytes < 0:
                break
            yield piece
        if left_nbytes:
            raise BrokenStreamError(f"there are {'more' if left_nbytes < 0 else 'fewer'} than {self.nbytes} bytes")


async def _on_thread(read: Callable[[], T]) -> T:
    """The result of ``read``, on a thread of its own.

    A disk that hangs then stops neither the event loop nor the threads that resolve names for heartbeats, and it does
    not delay the exit of the process. A cancelled call leaves the thread to itself.

    Raises:
        BrokenStreamError: ``read`` raised an error that it may raise.
    """
    future = start_on_thread(read, "rfork-stream", delays_exit=False)
    try:
        return await asyncio.shield(asyncio.wrap_future(future))
    except (RForkError, OSError) as error:
        raise BrokenStreamError(error) from error
