"""The division of a batch into parts that move together; both sides compute the same one from the lengths alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vllm_rfork.manifest.segments import Segment, batches

#: Pieces and bytes of one part: what a device library queues, or one call of the system moves, at one time.
PART_PIECES, PART_NBYTES = 256, 64 * 1024 * 1024
#: Pieces that one call of the system accepts (``IOV_MAX``).
CALL_PIECES = 1024


class Piece(NamedTuple):
    """Contiguous bytes in this process."""

    address: int
    nbytes: int


def parts(pieces: Sequence[Piece], max_pieces: int = PART_PIECES) -> Iterator[list[Piece]]:
    """Divide ``pieces``, in order; a part is not divided further."""
    segments = (Segment(address, 0, nbytes) for address, nbytes in pieces)
    for batch in batches(segments, max_nbytes=PART_NBYTES, max_items=max_pieces):
        yield [Piece(each.local, each.nbytes) for each in batch]
