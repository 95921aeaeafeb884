"""The digest notices whatever can happen to bytes on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_rfork.model import digest

#: Around a word, a row of columns, the rows that are read side by side, and a whole block.
SIZES = [0, 1, 7, 8, 9, 4096, 16_311, 16_312, 16_313, 260_992, 277_304, 1_000_003, 2_087_936, 2_087_944, 3_000_000]


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def test_the_digest_is_pinned() -> None:
    data = (torch.arange(3_000_000) * 2654435761 % 251).to(torch.uint8)
    assert digest.digest(data) == "803628a70cd4a337262687b467dde905"


@pytest.mark.parametrize("nbytes", SIZES)
def test_equal_bytes_have_equal_digests_wherever_they_lie(nbytes: int) -> None:
    data = random_bytes(nbytes)
    shifted = torch.empty(nbytes + 3, dtype=torch.uint8)[3:]
    shifted.copy_(data)
    assert digest.digest(shifted) == digest.digest(data)
    assert digest.digest(data.clone()) == digest.digest(data)


@pytest.mark.parametrize("nbytes", [size for size in SIZES if size])
def test_one_flipped_bit_is_noticed_wherever_it_is(nbytes: int) -> None:
    data = random_bytes(nbytes)
    before = digest.digest(data)
    for position in {0, nbytes - 1, nbytes // 2, nbytes // 3, max(0, nbytes - 9)}:
        for bit in (0, 7):
            changed = data.clone()
            changed[position] ^= 1 << bit
            assert digest.digest(changed) != before, (position, bit)


@pytest.mark.parametrize("unit", [8, 512, 4096, 8192, 16_384, 65_536, 260_984, 16_312 * 128, 1021 * 8])
def test_swapped_units_are_noticed(unit: int) -> None:
    data = random_bytes(4 * 1024 * 1024)
    for first, second in ((0, 1), (1, 3), (0, 6)):
        if (second + 1) * unit > data.numel():
            continue
        changed = data.clone()
        changed[first * unit : (first + 1) * unit] = data[second * unit : (second + 1) * unit]
        changed[second * unit : (second + 1) * unit] = data[first * unit : (first + 1) * unit]
        assert digest.digest(changed) != digest.digest(data)


def test_the_documented_blind_spot_is_the_only_one_of_its_kind() -> None:
    """Rows of columns may change places within one block; rows that are a word longer or shorter may not."""
    data = random_bytes(4 * 1024 * 1024)

    def swapped(unit: int) -> str:
        changed = data.clone()
        changed[:unit], changed[unit : 2 * unit] = data[unit : 2 * unit], data[:unit].clone()
        return digest.digest(changed)

    assert swapped(2039 * 8) == digest.digest(data)
    assert swapped(2038 * 8) != digest.digest(data)
    assert swapped(2040 * 8) != digest.digest(data)


@pytest.mark.parametrize("by", [1, 8, 64, 4096, 2039 * 8])
def test_shifted_bytes_are_noticed(by: int) -> None:
    data = random_bytes(2_000_000)
    assert digest.digest(torch.roll(data, by)) != digest.digest(data)


def test_stale_and_zero_bytes_are_noticed() -> None:
    data = random_bytes(2_000_000)
    stale = data.clone()
    stale[1_000_000:1_004_096] = random_bytes(4096, seed=1)
    zeroed = data.clone()
    zeroed[:4096] = 0
    assert len({digest.digest(data), digest.digest(stale), digest.digest(zeroed)}) == 3


def test_length_counts_also_where_the_rest_is_zero() -> None:
    digests = {digest.digest(torch.zeros(nbytes, dtype=torch.uint8)) for nbytes in SIZES}
    assert len(digests) == len(SIZES)


def test_the_number_of_threads_does_not_matter() -> None:
    data = random_bytes(5_000_000)
    threads = torch.get_num_threads()
    try:
        digests = set()
        for number in (1, 2):
            torch.set_num_threads(number)
            digests.add(digest.digest(data))
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


@pytest.mark.parametrize("byte", [0x80, 0x40, 0x01])
@pytest.mark.parametrize("nbytes", [4096, 3_000_000])
def test_a_lone_upper_byte_that_moves_is_noticed(byte: int, nbytes: int) -> None:
    """The sign or exponent of a word's last element: sums modulo 2**64 with odd weights alone would lose it."""
    data = torch.zeros(nbytes, dtype=torch.uint8)
    data[7] = byte
    before = digest.digest(data)
    for words in (1, 2, 64, 256, 509):
        assert digest.digest(torch.roll(data, 8 * words)) != before, words


def test_weights_lose_no_word_and_no_exchange_of_two() -> None:
    weights = digest._weights()
    assert bool((weights & 1).all())
    assert len((weights & 0xFFFF_FFFF).unique()) == digest.COLUMNS


def test_a_span_s_digest_does_not_depend_on_its_neighbours() -> None:
    """More rows than one buffer holds, in spans of every kind, some at odd addresses."""
    memory = random_bytes(6_000_000)
    spans = [memory[offset : offset + nbytes] for nbytes in SIZES for offset in (0, 3, 8)]
    alone = [digest.digest(span) for span in spans]
    assert digest.digests(iter(spans)) == alone
    assert digest.digests(reversed(spans)) == alone[::-1]
    assert digest.digests([]) == []


def test_the_sums_of_other_devices_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a block is summed at once, and more rows are gathered before they are weighted."""
    spans = [random_bytes(nbytes) for nbytes in SIZES]
    here = digest.digests(spans)
    monkeypatch.setattr(digest, "_STREAMS", 1 << 40)
    monkeypatch.setattr(digest, "_CPU_CAPACITY", digest._CAPACITY)
    assert digest.digests(spans) == here


class Recorder(TorchDispatchMode):
    """What torch was asked for: the names of the operations, and the bytes that they made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        inputs = tree_leaves((args, kwargs))
        known = {leaf.untyped_storage().data_ptr() for leaf in inputs if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.nbytes += leaf.untyped_storage().nbytes()
        return result


def test_the_host_waits_once_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations are queued; none asks for a value before the end, and none makes a copy of what it reads."""
    monkeypatch.setattr(digest, "_CPU_CAPACITY", 8)
    digest._weights()
    spans = list(random_bytes(16_000_000).split(4_000_000))
    with Recorder() as recorder:
        digest.digests(spans)
    assert not [name for name in recorder.names if "local_scalar" in name or "nonzero" in name or "item" in name]
    assert len([name for name in recorder.names if name.startswith("cat.")]) == 1
    assert recorder.nbytes < 2_000_000


def test_differing_spans_are_found_by_number_and_only_the_expected_ones_are_looked_at() -> None:
    spans = [random_bytes(1000, seed=number) for number in range(4)]
    expected = dict(enumerate(digest.digests(spans)))
    spans[1][5] ^= 1
    spans[3][5] ^= 1
    found = dict(enumerate(digest.digests(spans)))
    assert digest.differing(found, expected) == [1, 3]
    del expected[3]
    assert digest.differing(found, expected) == [1]
