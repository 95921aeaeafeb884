"""Over TCP, Mooncake gets segments in pieces, because it moves one large item slowly."""

from __future__ import annotations

import pytest

from vllm_rfork.engines.mooncake.pieces import PIECE_NBYTES, items
from vllm_rfork.manifest.segments import Segment

SEGMENTS = [Segment(1_000, 9_000_000, 3 * PIECE_NBYTES + 5), Segment(8_000_000, 1_000, 7), Segment(9_000_000, 0, 1)]


@pytest.mark.parametrize("most", [1, 3, 1000])
def test_pieces_cover_every_byte_once_and_in_order(most: int) -> None:
    parts = list(items(SEGMENTS, "tcp", most))
    assert max(map(len, parts)) <= most
    flat = [piece for part in parts for piece in part]
    assert all(0 < piece.nbytes <= PIECE_NBYTES for piece in flat)
    joined: list[Segment] = []
    for piece in flat:
        last = joined[-1] if joined else Segment(-1, -1, 0)
        if (last.local + last.nbytes, last.remote + last.nbytes) == (piece.local, piece.remote):
            joined[-1] = last._replace(nbytes=last.nbytes + piece.nbytes)
        else:
            joined.append(piece)
    assert joined == SEGMENTS


def test_other_protocols_get_the_segments_as_they_are() -> None:
    assert list(items(SEGMENTS, "rdma", 2)) == [SEGMENTS[:2], SEGMENTS[2:]]
