"""The items of native reads: segments, and over TCP their pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm_rfork.manifest.segments import Segment

#: Over TCP Mooncake moves items side by side, each of them slowly: 0.5 GB in 20 or 100 items read at 0.2 to 0.4 GB/s,
#: in pieces of this size at 1.0 to 1.2 (`make bench-engines`, 2026-11-30). Pieces of 1 MiB reached 0.4 to 0.6.
PIECE_NBYTES = 256 * 1024


def items(segments: Sequence[Segment], protocol: str, most: int) -> Iterator[list[Segment]]:
    """The items of each native call, at most ``most``: every byte of ``segments`` once, in order."""
    cut = list(_pieces(segments)) if protocol == "tcp" else segments
    for start in range(0, len(cut), most):
        yield list(cut[start : start + most])


def _pieces(segments: Sequence[Segment]) -> Iterator[Segment]:
    for local, remote, nbytes in segments:
        for offset in range(0, nbytes, PIECE_NBYTES):
            yield Segment(local + offset, remote + offset, min(PIECE_NBYTES, nbytes - offset))
