"""Digests over memory: one pass at memory speed, the same arithmetic on CPU, CUDA and NPU.

The bytes are read as 64-bit words in blocks of ``ROWS`` × ``COLUMNS``; the last one may have fewer rows. Each block is
summed over its rows modulo 2**64, which leaves one row. The remaining words form a row of their own, padded with zeros.
Each of these rows becomes two words: the weighted sum of its words, and that of their upper halves, with odd weights.
BLAKE2b digests the length and these words.

A change of a single word is always detected: its column's sum changes, and an odd weight loses nothing. Two words that
change places are always detected if they are in different columns: no two weights are equal in their lower 32 bits,
and the upper halves are weighted separately. The column count is a prime, so that no natural unit (a row of a matrix, a
page, a whole tensor) is aligned with a column.

Not detected: rows of exactly ``8 * COLUMNS`` = 16312 bytes, or multiples, that change places within one block of 2 MiB.
Tensors do not usually have such rows.

The digest protects against transfer errors, not against an adversary, who can choose bytes for any digest.

All work is queued on the device, and the host waits once for all spans. It takes less than 22 MB of device memory, and
17 MB more for a span at an odd address.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping

import torch

ALGORITHM = "rfork-colsum64-2"
ROWS = 128
#: A prime: see above.
COLUMNS = 2039

_WORD = 8
_ROW_NBYTES = _WORD * COLUMNS
#: Rows of sums that are weighted at a time: 4 MB, for up to 534 MB of data.
_CAPACITY = 256
#: The same for a processor: its threads rarely synchronize, and the rows fit its cache.
_CPU_CAPACITY = 128
#: Blocks of a span at an odd address that are copied at a time.
_COPIED_BLOCKS = 8
#: A processor prefetches about this many streams; reading more rows at once takes twice as long.
_STREAMS = 16


def digest(data: torch.Tensor) -> str:
    """Hexadecimal digest over ``data``, a 1-D contiguous uint8 tensor on any device."""
    return digests([data])[0]


def digests(spans: Iterable[torch.Tensor]) -> list[str]:
    """One digest per span, in order; waits for the device once, after all work is queued."""
    digester = Digester()
    for span in spans:
        digester.add(span)
    return digester.finish()


def differing(found: Mapping[int, str], expected: Mapping[int, str]) -> list[int]:
    """The spans in ``expected`` whose digest in ``found`` is another one."""
    return [number for number, wanted in expected.items() if found[number] != wanted]


class Digester:
    """Digests of spans that one thread adds one after the other."""

    def __init__(self) -> None:
        self._sums: dict[torch.device, _RowSums] = {}
        self._places: list[tuple[torch.device, int, int, int]] = []

    def add(self, span: torch.Tensor) -> None:
        """Queue the digest of ``span``, a 1-D contiguous uint8 tensor that must not change until :meth:`finish`."""
        on_device = self._sums.get(span.device) or self._sums.setdefault(span.device, _RowSums(span.device))
        first = on_device.count
        on_device.add(span)
        self._places.append((span.device, first, on_device.count, span.numel()))

    def finish(self) -> list[str]:
        """Wait for the device, and return one digest per span, in the order of :meth:`add`."""
        results = {device: on_device.finish() for device, on_device in self._sums.items()}
        return [_hash(nbytes, results[device], first, end) for device, first, end, nbytes in self._places]


def _hash(nbytes: int, results: memoryview, first: int, end: int) -> str:
    state = hashlib.blake2b(nbytes.to_bytes(8, "little"), digest_size=16, person=b"rfork-digest-2\0\0")
    state.update(results[first * 2 * _WORD : end * 2 * _WORD])
    return state.hexdigest()


class _RowSums:
    """The rows of sums of one device's spans, in order, weighted one buffer at a time.

    A buffer is reused as soon as the work on it is queued, because a device executes its queue in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._device = device
        on_cpu = device.type == "cpu"
        self._capacity = _CPU_CAPACITY if on_cpu else _CAPACITY
        self._rows = torch.zeros(self._capacity, COLUMNS, dtype=torch.int64, device=device)
        self._row_bytes = self._rows.view(torch.uint8)
        self._scratch = torch.empty_like(self._rows)
        # Allocated once: on a processor, allocating it for each use takes longer than the sums.
        self._groups = self._rows.new_empty(self._capacity * ROWS // _STREAMS if on_cpu else 0, COLUMNS)
        self._weights = _weights().to(device)
        self._used = 0
        self._weighted: list[torch.Tensor] = []

    def add(self, data: torch.Tensor) -> None:
        """Queue the sums over one span."""
        nbytes = data.numel()
        position, rows = 0, nbytes // _ROW_NBYTES
        # Words must be aligned. A span at an odd address is rare; it is copied piece by piece.
        aligned = data.data_ptr() % _WORD == 0 and data.storage_offset() % _WORD == 0
        words = _words(data, rows) if rows and aligned else None
        most = self._capacity if words is not None else _COPIED_BLOCKS
        while rows:
            blocks = min(rows // ROWS, most, self._capacity - self._used) or 1
            height = min(rows, ROWS)
            if words is None:
                piece = data[position * _ROW_NBYTES : (position + blocks * height) * _ROW_NBYTES].clone()
                self._sum(_words(piece, blocks * height), 0, blocks, height)
            else:
                self._sum(words, position, blocks, height)
            position += blocks * height
            rows -= blocks * height
        if rest := nbytes - position * _ROW_NBYTES:
            # Unused rows contain zeros, which are the padding.
            self._row_bytes[self._used, :rest].copy_(data[nbytes - rest :])
            self._advance(1)

    def _sum(self, words: torch.Tensor, row: int, blocks: int, rows: int) -> None:
        """Queue the sums over ``blocks`` blocks of ``rows`` rows each, from ``row`` on."""
        shape, stride = (blocks, rows, COLUMNS), (rows * COLUMNS, COLUMNS, 1)
        part = words.as_strided(shape, stride, words.storage_offset() + row * COLUMNS)
        out = self._rows[self._used : self._used + blocks]
        if len(self._groups) and rows > _STREAMS:
            self._sum_in_streams(part, out)
        else:
            torch.sum(part, dim=1, out=out)
        self._advance(blocks)

    def _sum_in_streams(self, words: torch.Tensor, out: torch.Tensor) -> None:
        """``words.sum(1)``, reading ``_STREAMS`` rows at a time."""
        blocks, rows, _ = words.shape
        groups = rows // _STREAMS
        whole = words[:, : groups * _STREAMS].unflatten(1, (groups, _STREAMS))
        sums = self._groups[: blocks * groups].view(blocks, groups, COLUMNS)
        torch.sum(whole, dim=2, out=sums)
        torch.sum(sums, dim=1, out=out)
        if rows % _STREAMS:
            out += words[:, groups * _STREAMS :].sum(1)

    def _advance(self, rows: int) -> None:
        self._used += rows
        self.count += rows
        if self._used == self._capacity:
            self._weigh()

    def _weigh(self) -> None:
        rows, scratch = self._rows[: self._used], self._scratch[: self._used]
        weighted = torch.empty(self._used, 2, dtype=torch.int64, device=self._device)
        torch.mul(rows, self._weights, out=scratch)
        torch.sum(scratch, dim=1, out=weighted[:, 0])
        scratch.copy_(rows.view(torch.int32)[:, 1::2])
        scratch.mul_(self._weights)
        torch.sum(scratch, dim=1, out=weighted[:, 1])
        rows.zero_()
        self._weighted.append(weighted)
        self._used = 0

    def finish(self) -> memoryview:
        """Wait for the device, and return two words per row."""
        self._weigh()
        return memoryview(torch.cat(self._weighted).cpu().numpy().tobytes())


def _words(data: torch.Tensor, rows: int) -> torch.Tensor:
    """The first ``rows`` rows of ``data`` as words."""
    return data[: rows * _ROW_NBYTES].view(torch.int64)


@functools.cache
def _weights() -> torch.Tensor:
    """``COLUMNS`` odd numbers of 64 bits, from SplitMix64, which is part of :data:`ALGORITHM`."""
    weights, state, mask = [], 0, 2**64 - 1
    for _ in range(COLUMNS):
        state = (state + 0x9E3779B97F4A7C15) & mask
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        weights.append((mixed ^ (mixed >> 31)) | 1)
    return torch.tensor([weight - 2**64 if weight >= 2**63 else weight for weight in weights], dtype=torch.int64)
