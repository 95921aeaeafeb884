"""Copies from a seed to a receiver: segments, cut into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Segment(NamedTuple):
    """One contiguous copy: local address, remote address, length in bytes."""

    local: int
    remote: int
    nbytes: int


def batches(segments: Iterable[Segment], *, max_nbytes: int, max_items: int) -> Iterator[list[Segment]]:
    """Cut ``segments`` into batches of at most ``max_nbytes`` bytes and ``max_items`` items.

    A segment larger than the bound is split. Order is kept, every byte is covered exactly once.
    """
    if max_nbytes <= 0 or max_items <= 0:
        raise ValueError(f"a batch needs positive bounds, got {max_nbytes} bytes and {max_items} items")
    batch: list[Segment] = []
    room = max_nbytes
    for segment in segments:
        local, remote, left = segment
        while left:
            take = min(left, room)
            batch.append(Segment(local, remote, take))
            local, remote, left, room = local + take, remote + take, left - take, room - take
            if room == 0 or len(batch) == max_items:
                yield batch
                batch, room = [], max_nbytes
    if batch:
        yield batch
