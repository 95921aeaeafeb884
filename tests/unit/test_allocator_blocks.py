"""Regions fitted into the allocator's blocks never overlap, never leave a block, and each span lies in exactly one."""

from __future__ import annotations

import itertools
import random

import pytest

from tests.ascend.fake_torch_npu import segment
from vllm_rfork.devices.allocator_blocks import MAX_GAP, Block, BlockMap, blocks_of, merge_into_blocks
from vllm_rfork.errors import ForkError
from vllm_rfork.manifest.alignment import HIXL_ALIGNMENT
from vllm_rfork.manifest.schema import Region

MIB = 1 << 20


def _holders(region: Region, ranges: tuple[Region, ...]) -> list[int]:
    return [
        number
        for number, outer in enumerate(ranges)
        if outer.address <= region.address and region.address + region.nbytes <= outer.address + outer.nbytes
    ]


def test_a_snapshot_gives_the_blocks_of_one_device_by_address() -> None:
    snapshot = [segment(8 * MIB, MIB), segment(2 * MIB, MIB, expandable=True), segment(MIB, MIB, device=1)]

    assert blocks_of(snapshot, 0) == [Block(2 * MIB, MIB, expandable=True), Block(8 * MIB, MIB)]
    assert blocks_of(snapshot, 1) == [Block(MIB, MIB)]


def test_a_snapshot_of_an_old_torch_says_nothing_about_expandable_segments() -> None:
    old = segment(MIB, MIB)
    del old["is_expandable"]

    assert blocks_of([old], 0) == [Block(MIB, MIB)]


def test_tensors_of_one_block_are_registered_as_one_range() -> None:
    regions = [Region(20 * MIB + number * 4096, 4000) for number in range(100)]
    random.Random(1).shuffle(regions)

    ranges, index = merge_into_blocks(regions, [Block(20 * MIB, 20 * MIB)])

    assert ranges == (Region(20 * MIB, 99 * 4096 + 4000),)
    assert set(index) == {0}


def test_neighbouring_blocks_are_not_joined() -> None:
    blocks = [Block(20 * MIB, 2 * MIB), Block(22 * MIB, 2 * MIB)]
    regions = [Region(22 * MIB - 512, 512), Region(22 * MIB, 512)]

    ranges, index = merge_into_blocks(regions, blocks)

    assert ranges == tuple(regions)
    assert index == (0, 1)


@pytest.mark.parametrize(("gap", "count"), [(MAX_GAP - 1, 1), (MAX_GAP, 2)])
def test_a_gap_that_may_be_somebody_elses_is_left_out(gap: int, count: int) -> None:
    regions = [Region(64 * MIB, 512), Region(64 * MIB + 512 + gap, 512)]

    ranges, _ = merge_into_blocks(regions, [Block(64 * MIB, 64 * MIB)])

    assert len(ranges) == count


def test_memory_in_no_known_block_is_registered_as_it_is() -> None:
    regions = [Region(900 * MIB, 512), Region(900 * MIB + 512, 512)]

    ranges, index = merge_into_blocks(regions, [Block(MIB, MIB), Block(1000 * MIB, MIB)])

    assert ranges == tuple(regions)
    assert index == (0, 1)


@pytest.mark.parametrize("address", [20 * MIB - 10, 40 * MIB - 10])
def test_a_region_across_a_blocks_border_is_an_error(address: int) -> None:
    with pytest.raises(ForkError, match="one block"):
        merge_into_blocks([Region(address, 20)], [Block(20 * MIB, 20 * MIB)])


def test_an_aligned_range_begins_where_the_route_wants_it_and_stays_in_its_block() -> None:
    block = Block(20 * MIB, 20 * MIB)

    ranges, _ = merge_into_blocks([Region(25 * MIB + 512, 512)], [block], alignment=HIXL_ALIGNMENT)

    assert ranges == (Region(24 * MIB, MIB + 1024),)


def test_a_block_that_begins_between_two_multiples_cannot_be_aligned() -> None:
    with pytest.raises(ForkError, match="multiple of 2097152"):
        merge_into_blocks([Region(21 * MIB, 512)], [Block(21 * MIB, MIB)], alignment=HIXL_ALIGNMENT)


def test_memory_in_no_known_block_is_never_aligned_into_its_neighbours() -> None:
    with pytest.raises(ForkError, match="multiple of 2097152"):
        merge_into_blocks([Region(21 * MIB, 512)], [], alignment=HIXL_ALIGNMENT)


def test_a_partly_known_region_is_told_from_a_strange_one() -> None:
    known = BlockMap([Block(MIB, MIB), Block(4 * MIB, MIB)])

    assert known.holding(Region(4 * MIB, MIB)) == Block(4 * MIB, MIB)
    assert known.holding(Region(3 * MIB, MIB)) is None
    with pytest.raises(ForkError):
        known.holding(Region(0, 6 * MIB))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("alignment", [1, 512, HIXL_ALIGNMENT])
def test_ranges_are_disjoint_and_hold_each_region_once(seed: int, alignment: int) -> None:
    chance = random.Random(seed)
    blocks, regions, address = [], [], 2 * MIB
    for _ in range(chance.randint(1, 8)):
        block = Block(address, 2 * MIB * chance.randint(1, 8))
        blocks.append(block)
        place = block.address
        while place < block.end:
            nbytes = chance.randint(1, min(3 * MIB, block.end - place))
            if chance.random() < 0.6:
                regions.append(Region(place, nbytes))
            place += nbytes
        address = block.end + 2 * MIB * chance.randint(0, 2)
    chance.shuffle(regions)

    ranges, index = merge_into_blocks(regions, blocks, alignment=alignment)

    for before, after in itertools.pairwise(ranges):
        assert before.address + before.nbytes <= after.address
    for outer in ranges:
        assert outer.address % alignment == 0
        assert BlockMap(blocks).holding(outer) is not None
    assert [_holders(region, ranges) for region in regions] == [[number] for number in index]
