"""Blocks of the caching allocator, and the ranges of them to register. Plain data: no torch.

Registration costs time per call and per range, so ranges that are close together in one block are registered as one. A
range never leaves its block: the memory beyond it belongs to someone else, or is not mapped.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.schema import Region

#: Two tensors of one block are registered together if fewer bytes than this lie between them. The allocator rounds
#: requests up by less. A larger gap is in use elsewhere or was freed; in an expandable segment, whole pages of this
#: size may lose their physical memory.
MAX_GAP = 2 * 1024 * 1024


@dataclass(frozen=True)
class Block:
    """One contiguous piece of device memory of the caching allocator (torch calls it a segment).

    Attributes:
        expandable: virtual memory whose physical pages are mapped and unmapped.
    """

    address: int
    nbytes: int
    expandable: bool = False

    @property
    def end(self) -> int:
        """One past the last address."""
        return self.address + self.nbytes


def blocks_of(snapshot: Iterable[Mapping[str, Any]], index: int) -> list[Block]:
    """The blocks on device ``index`` in an allocator's snapshot, by address.

    ``snapshot`` is the result of ``torch.cuda.memory_snapshot()`` or ``torch_npu.npu.memory_snapshot()``: one mapping
    per segment.
    """
    return sorted(
        (
            Block(int(segment["address"]), int(segment["total_size"]), bool(segment.get("is_expandable", False)))
            for segment in snapshot
            if int(segment["device"]) == index
        ),
        key=lambda block: block.address,
    )


class BlockMap:
    """Blocks by address, to find the one that contains a region."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._blocks = sorted(blocks, key=lambda block: block.address)
        self._starts = [block.address for block in self._blocks]

    def holding(self, region: Region) -> Block | None:
        """The block that contains ``region``; None if no known block does.

        Raises:
            ForkError: a block contains part of it.
        """
        end = region.address + region.nbytes
        number = bisect.bisect_left(self._starts, end) - 1  # the last block that begins before the region ends
        if number < 0 or self._blocks[number].end <= region.address:
            return None
        block = self._blocks[number]
        if region.address < block.address or end > block.end:
            raise ForkError(f"{region} does not lie in one block of the allocator")
        return block


def merge_into_blocks(
    regions: Sequence[Region],
    blocks: Iterable[Block],
    *,
    alignment: int = 1,
    max_gap_nbytes: int = MAX_GAP,
) -> tuple[tuple[Region, ...], tuple[int, ...]]:
    """A few ranges to register instead of many regions, and the range of each region.

    Regions of one block are joined if fewer than ``max_gap_nbytes`` lie between them. The ranges do not overlap, each
    region lies in exactly one, and each begins at a multiple of ``alignment`` bytes within its block. A region in no
    known block is a range of its own.

    Returns:
        The ranges by address, and for each of ``regions``, in the given order, the index of its range.

    Raises:
        ForkError: a range cannot begin at a multiple of ``alignment``, or a block contains part of a region.
    """
    known = BlockMap(blocks)
    merged: list[tuple[int, int, Block | None]] = []
    index = [0] * len(regions)
    for number in sorted(range(len(regions)), key=lambda number: regions[number].address):
        region = regions[number]
        block = known.holding(region)
        low, high = region.address - region.address % alignment, region.address + region.nbytes
        floor = region.address if block is None else block.address
        last = merged[-1] if merged else None
        same_block = last is not None and block is not None and block == last[2]
        if last is not None and (region.address < last[1] or (same_block and low - last[1] < max_gap_nbytes)):
            # Overlapping ranges are always joined, because engines reject them.
            merged[-1] = (last[0], max(high, last[1]), last[2])
        elif low < floor:
            raise ForkError(
                f"{region} cannot be registered from a multiple of {alignment} bytes on: its block of the allocator "
                f"begins at {floor:#x}"
            )
        else:
            merged.append((low, high, block))
        index[number] = len(merged) - 1
    return tuple(Region(low, high - low) for low, high, _ in merged), tuple(index)
