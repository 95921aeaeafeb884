"""The division of a batch into messages; both sides compute the same one from the lengths alone.

A long segment is sent from where it is, in parts. Short ones share a message, which is copied through a staging buffer:
20,000 messages of 10 KB take ten times as long as 50 of 4 MB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vllm_rfork.manifest.segments import Segment, batches

#: The largest message of a long segment, in bytes.
DIRECT_NBYTES = 16 * 1024 * 1024
#: The largest message of several short segments, in bytes: the size of a staging buffer.
STAGED_NBYTES = 4 * 1024 * 1024
#: Segments from this length on are not staged: a message costs some 20 µs, as long as copying 200 KB on both sides.
_LONG_NBYTES = 128 * 1024
#: Pieces and bytes that a group over a device library queues at one time.
PART_PIECES, PART_NBYTES = 256, 64 * 1024 * 1024


class Piece(NamedTuple):
    """Contiguous bytes in this process."""

    address: int
    nbytes: int


class Message(NamedTuple):
    """Pieces that travel together; one alone is sent without a copy."""

    pieces: tuple[Piece, ...]
    nbytes: int


def parts(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Divide ``pieces`` into what a device library queues at one time; a part is not divided further."""
    segments = (Segment(address, 0, nbytes) for address, nbytes in pieces)
    for batch in batches(segments, max_nbytes=PART_NBYTES, max_items=PART_PIECES):
        yield [Piece(each.local, each.nbytes) for each in batch]


def messages(pieces: Sequence[Piece]) -> Iterator[Message]:
    """Divide ``pieces``, in order; every byte is in exactly one message."""
    short: list[Piece] = []
    held = 0
    for piece in pieces:
        if short and (piece.nbytes >= _LONG_NBYTES or held + piece.nbytes > STAGED_NBYTES):
            yield Message(tuple(short), held)
            short, held = [], 0
        if piece.nbytes < _LONG_NBYTES:
            short.append(piece)
            held += piece.nbytes
            continue
        for start in range(0, piece.nbytes, DIRECT_NBYTES):
            part = Piece(piece.address + start, min(DIRECT_NBYTES, piece.nbytes - start))
            yield Message((part,), part.nbytes)
    if short:
        yield Message(tuple(short), held)


def gather(pieces: Sequence[Piece], to: int) -> None:
    """Copy ``pieces`` of host memory one behind the other to ``to``."""
    for address, nbytes in pieces:
        ctypes.memmove(to, address, nbytes)
        to += nbytes


def scatter(source: int, pieces: Sequence[Piece]) -> None:
    """The inverse of :func:`gather`."""
    for address, nbytes in pieces:
        ctypes.memmove(address, source, nbytes)
        source += nbytes
