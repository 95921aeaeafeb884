"""Digests over memory: one pass at memory speed, the same arithmetic on CPU, CUDA and NPU.

The bytes are read as 64-bit words in blocks of ``ROWS`` × ``COLUMNS``; each block is summed over its rows, modulo
2**64, and the sums, ``ROWS`` times fewer, are summed again with another column count until little is left; that,
with the length and the words that fill no block, goes into BLAKE2b. Column counts are primes, so that no natural
unit (a row of a matrix, a page, a whole tensor) lines up with a column: swapping or shifting such units moves words
to other columns. A single changed bit changes its column's sum by a power of two and is always seen.

What it cannot see by construction: rows of exactly ``8 * COLUMNS[0]`` = 16312 bytes that change places within one
block. No tensor has such rows by nature.

This guards against bytes that went wrong on the way, not against an adversary, who could answer for any digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

ALGORITHM = "rfork-colsum64-1"
ROWS = 32
#: Primes, one per level; the last is used for all further levels.
COLUMNS = (2039, 1021, 509)

_WORD = 8


def digest(data: torch.Tensor) -> str:
    """Hexadecimal digest over ``data``, a 1-D contiguous uint8 tensor on any device."""
    nbytes = data.numel()
    state = hashlib.blake2b(nbytes.to_bytes(8, "little"), digest_size=16, person=b"rfork-digest-1\0\0")
    whole = nbytes - nbytes % _WORD
    _absorb(state, data[whole:])
    if data.data_ptr() % _WORD or data.storage_offset() % _WORD:
        # Rare: a view at an odd address. Words must be aligned, so this one is copied.
        data = data.clone()
    words = data[:whole].view(torch.int64)
    level = 0
    while words.numel() > 2 * COLUMNS[min(level, len(COLUMNS) - 1)]:
        columns = COLUMNS[min(level, len(COLUMNS) - 1)]
        rows = words.numel() // columns
        blocks = rows // ROWS
        cut = blocks * ROWS * columns
        # Whole blocks, then the rows that fill no block, then the words that fill no row.
        sums = [torch.sum(words[:cut].view(blocks, ROWS, columns), dim=1).view(-1)]
        if rows % ROWS:
            sums.append(torch.sum(words[cut : rows * columns].view(-1, columns), dim=0))
        _absorb(state, words[rows * columns :])
        words = sums[0] if len(sums) == 1 else torch.cat(sums)
        level += 1
    _absorb(state, words)
    return state.hexdigest()


def digests(spans: Iterable[torch.Tensor]) -> list[str]:
    """One digest per span, in order."""
    return [digest(span) for span in spans]


def wrong_spans(spans: Sequence[torch.Tensor], expected: dict[int, str]) -> list[int]:
    """Numbers of the spans whose digest is not the expected one; only those in ``expected`` are looked at."""
    return [number for number, wanted in expected.items() if digest(spans[number]) != wanted]


def _absorb(state: hashlib.blake2b, rest: torch.Tensor) -> None:
    state.update(rest.cpu().contiguous().view(torch.uint8).numpy().tobytes())
