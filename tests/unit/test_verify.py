"""The digest notices whatever can happen to bytes on the way."""

from __future__ import annotations

import pytest
import torch

from vllm_rfork import verify

SIZES = [0, 1, 7, 8, 9, 4096, 16312, 32624, 32632, 130_496, 1_000_003, 3_000_000]


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def test_the_digest_is_pinned() -> None:
    data = (torch.arange(3_000_000) * 2654435761 % 251).to(torch.uint8)
    assert verify.digest(data) == "7ccd8b9cf4f9d1506eac2043d34a2e7d"


@pytest.mark.parametrize("nbytes", SIZES)
def test_equal_bytes_have_equal_digests_wherever_they_lie(nbytes: int) -> None:
    data = random_bytes(nbytes)
    shifted = torch.empty(nbytes + 3, dtype=torch.uint8)[3:]
    shifted.copy_(data)
    assert verify.digest(shifted) == verify.digest(data)
    assert verify.digest(data.clone()) == verify.digest(data)


@pytest.mark.parametrize("nbytes", [size for size in SIZES if size])
def test_one_flipped_bit_is_noticed_wherever_it_is(nbytes: int) -> None:
    data = random_bytes(nbytes)
    before = verify.digest(data)
    for position in {0, nbytes - 1, nbytes // 2, nbytes // 3, max(0, nbytes - 9)}:
        for bit in (0, 7):
            changed = data.clone()
            changed[position] ^= 1 << bit
            assert verify.digest(changed) != before, (position, bit)


@pytest.mark.parametrize("unit", [8, 512, 4096, 8192, 16_384, 65_536, 2039 * 8 * 32, 1021 * 8])
def test_swapped_units_are_noticed(unit: int) -> None:
    data = random_bytes(4 * 1024 * 1024)
    for first, second in ((0, 1), (1, 3), (0, 6)):
        if (second + 1) * unit > data.numel():
            continue
        changed = data.clone()
        changed[first * unit : (first + 1) * unit] = data[second * unit : (second + 1) * unit]
        changed[second * unit : (second + 1) * unit] = data[first * unit : (first + 1) * unit]
        assert verify.digest(changed) != verify.digest(data)


def test_the_documented_blind_spot_is_the_only_one_of_its_kind() -> None:
    """Rows of the first level's width may change places within one block; by one word more or less they may not."""
    data = random_bytes(4 * 1024 * 1024)

    def swapped(unit: int) -> str:
        changed = data.clone()
        changed[:unit], changed[unit : 2 * unit] = data[unit : 2 * unit], data[:unit].clone()
        return verify.digest(changed)

    assert swapped(2039 * 8) == verify.digest(data)
    assert swapped(2038 * 8) != verify.digest(data)
    assert swapped(2040 * 8) != verify.digest(data)


@pytest.mark.parametrize("by", [1, 8, 64, 4096, 2039 * 8])
def test_shifted_bytes_are_noticed(by: int) -> None:
    data = random_bytes(2_000_000)
    assert verify.digest(torch.roll(data, by)) != verify.digest(data)


def test_stale_and_zero_bytes_are_noticed() -> None:
    data = random_bytes(2_000_000)
    stale = data.clone()
    stale[1_000_000:1_004_096] = random_bytes(4096, seed=1)
    zeroed = data.clone()
    zeroed[:4096] = 0
    assert len({verify.digest(data), verify.digest(stale), verify.digest(zeroed)}) == 3


def test_length_counts_also_where_the_rest_is_zero() -> None:
    digests = {verify.digest(torch.zeros(nbytes, dtype=torch.uint8)) for nbytes in SIZES}
    assert len(digests) == len(SIZES)


def test_the_number_of_threads_does_not_matter() -> None:
    data = random_bytes(5_000_000)
    threads = torch.get_num_threads()
    try:
        digests = set()
        for number in (1, 2):
            torch.set_num_threads(number)
            digests.add(verify.digest(data))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_wrong_spans_are_found_by_number_and_only_the_expected_ones_are_looked_at() -> None:
    spans = [random_bytes(1000, seed=number) for number in range(4)]
    expected = dict(enumerate(verify.digests(spans)))
    spans[1][5] ^= 1
    spans[3][5] ^= 1
    assert verify.wrong_spans(spans, expected) == [1, 3]
    del expected[3]
    assert verify.wrong_spans(spans, expected) == [1]
