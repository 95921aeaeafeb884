"""The registration table that adapters share: which local memory an engine may touch.

Plain bookkeeping over :class:`~vllm_rfork.manifest.schema.Region`; must not import an engine or native code.
Adapters ask it before they ask their engine, so that every engine refuses the same mistakes with the same words.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment


class RegionTable:
    """Disjoint regions in address order. Not thread-safe: one caller at a time, as the port has it."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._starts: list[int] = []
        self._nbytes_at: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Sum of the registered regions' lengths, in bytes."""
        return sum(self._nbytes_at.values())

    @property
    def regions(self) -> list[Region]:
        """What is registered, in address order."""
        return [Region(start, self._nbytes_at[start]) for start in self._starts]

    def check_new(self, regions: Sequence[Region]) -> None:
        """Raise :class:`EngineError` where one of ``regions`` is empty or overlaps another or a registered one."""
        merged = sorted([*self.regions, *regions], key=lambda region: region.address)
        for region in regions:
            if region.address <= 0 or region.nbytes <= 0:
                raise EngineError(self._engine, "register", f"{region} is not a region")
        for before, after in itertools.pairwise(merged):
            if before.address + before.nbytes > after.address:
                raise EngineError(self._engine, "register", f"{before} and {after} overlap")

    def add(self, regions: Iterable[Region]) -> None:
        """Record ``regions``, which :meth:`check_new` has passed."""
        for region in regions:
            self._nbytes_at[region.address] = region.nbytes
        self._starts = sorted(self._nbytes_at)

    def clear(self) -> None:
        """Drop everything."""
        self._starts = []
        self._nbytes_at = {}

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether ``nbytes`` (> 0) at ``address`` lie within one region."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or nbytes <= 0:
            return False
        start = self._starts[index]
        return address + nbytes <= start + self._nbytes_at[start]

    def check_local(self, segments: Iterable[Segment]) -> None:
        """Raise :class:`EngineError` where a segment's local side does not lie within one region."""
        for segment in segments:
            if not self.holds(segment.local, segment.nbytes):
                raise EngineError(
                    self._engine,
                    "read",
                    f"{segment.nbytes} bytes at local address {segment.local:#x} do not lie in one registered region",
                    side="receiver",
                )
