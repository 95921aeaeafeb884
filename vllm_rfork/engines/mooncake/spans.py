"""The memory to register with Mooncake for many regions: neighbours as one span.

Mooncake compares each registration with all others (2,000 take 0.1 s, 10,000 take 7 s) and describes them in one
document of at most 1 MiB. Neighbours are regions with no whole page between them: each byte of the gap lies in a page
of theirs, so it is mapped, as the transport requires.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Sequence

from vllm_rfork.engines.mooncake.endpoint import NAME
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region

#: Mooncake's document has room for some 15,000.
MAX_SPANS = 10_000
_PAGE = mmap.PAGESIZE


class Spans:
    """The registered spans in address order. Not thread-safe."""

    def __init__(self) -> None:
        self._spans: list[Region] = []

    def new(self, regions: Sequence[Region], *, merge: bool) -> list[Region]:
        """The spans to register for ``regions``, which overlap no other region: without those that are registered.

        Args:
            merge: register neighbours as one. False for device memory, where no page says what is mapped.

        Raises:
            EngineError: there would be more than :data:`MAX_SPANS`.
        """
        starts = [span.address for span in self._spans]
        spans: list[Region] = []
        for region in sorted(regions, key=lambda each: each.address):
            below = bisect.bisect_right(starts, region.address)
            if below and _end(region) <= _end(self._spans[below - 1]):
                continue  # in a gap between regions that were registered as one
            last = spans[-1] if spans else None
            between = last is not None and below > bisect.bisect_right(starts, last.address)
            if merge and last is not None and not between and _neighbours(last, region):
                spans[-1] = Region(last.address, _end(region) - last.address)
            else:
                spans.append(region)
        if len(spans) + len(self._spans) > MAX_SPANS:
            number = len(spans) + len(self._spans)
            problem = f"the memory is in {number} separate blocks, and Mooncake describes at most {MAX_SPANS} to a peer"
            raise EngineError(NAME, "register", problem)
        return spans

    def add(self, spans: Sequence[Region]) -> None:
        """Record ``spans``, which are registered now."""
        self._spans = sorted([*self._spans, *spans], key=lambda span: span.address)

    def clear(self) -> None:
        """Drop everything."""
        self._spans = []


def _end(region: Region) -> int:
    return region.address + region.nbytes


def _neighbours(before: Region, after: Region) -> bool:
    """Return True if no whole page lies between the two."""
    return after.address // _PAGE - (_end(before) - 1) // _PAGE <= 1
