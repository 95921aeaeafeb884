"""The registrations of an engine: the local memory that it may read and write.

Adapters check their arguments here first, so every engine refuses the same mistakes with the same texts.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence

from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment


class RegionTable:
    """Disjoint regions in address order. Not thread-safe."""

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
        """The registered regions, in address order."""
        return [Region(start, self._nbytes_at[start]) for start in self._starts]

    def check_new(self, regions: Sequence[Region]) -> None:
        """Raise :class:`EngineError` if a region is empty, or overlaps another or a registered one."""
        merged = sorted([*self.regions, *regions], key=lambda region: region.address)
        for region in regions:
            if region.address <= 0 or region.nbytes <= 0:
                raise EngineError(self._engine, "register", f"{region} is not a region")
        for before, after in itertools.pairwise(merged):
            if before.address + before.nbytes > after.address:
                raise EngineError(self._engine, "register", f"{before} and {after} overlap")

    def add(self, regions: Iterable[Region]) -> None:
        """Record ``regions``, which :meth:`check_new` has accepted."""
        for region in regions:
            self._nbytes_at[region.address] = region.nbytes
        self._starts = sorted(self._nbytes_at)

    def clear(self) -> None:
        """Drop everything."""
        self._starts = []
        self._nbytes_at = {}

    def holds(self, address: int, nbytes: int) -> bool:
        """Return True if one region contains ``nbytes`` (> 0) at ``address``."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or nbytes <= 0:
            return False
        start = self._starts[index]
        return address + nbytes <= start + self._nbytes_at[start]

    def check_local(self, segments: Iterable[Segment]) -> None:
        """Raise :class:`EngineError` if no single region contains the local side of a segment."""
        holds = self.holds  # a batch may have thousands of segments, and the device waits meanwhile
        for local, _, nbytes in segments:
            if not holds(local, nbytes):
                raise EngineError(
                    self._engine,
                    "read",
                    f"{nbytes} bytes at local address {local:#x} do not lie in one registered region",
                    side="receiver",
                )
