"""Ordered containers with look-ups whose cost does not grow with their size."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator

#: A deadline: its kind and up to two names. Those that are due together are in alphabetical order.
Name = tuple[str, str, str]

_SLACK = 64


class RankedSet:
    """Addresses by score, the lowest first; changing a score is logarithmic.

    A heap whose outdated entries are skipped when they surface, and rebuilt once they are the majority.
    """

    __slots__ = ("_heap", "_scores")

    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []
        self._scores: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._scores)

    def put(self, address: str, score: int) -> None:
        """Add ``address`` or change its score."""
        if self._scores.get(address) == score:
            return
        self._scores[address] = score
        heapq.heappush(self._heap, (score, address))
        if len(self._heap) > 2 * len(self._scores) + _SLACK:
            self._heap = [(each, name) for name, each in self._scores.items()]
            heapq.heapify(self._heap)

    def discard(self, address: str) -> None:
        """Remove ``address``, if it is here."""
        self._scores.pop(address, None)

    def best(self, exclude: Container[str]) -> tuple[int, str] | None:
        """Return the lowest ``(score, address)`` not in ``exclude``, without removing it."""
        passed: list[tuple[int, str]] = []
        found = None
        while self._heap:
            top = self._heap[0]
            if self._scores.get(top[1]) != top[0]:
                heapq.heappop(self._heap)
            elif top[1] in exclude:
                passed.append(heapq.heappop(self._heap))
            else:
                found = top
                break
        for each in passed:
            heapq.heappush(self._heap, each)
        return found


class Deadlines:
    """Deadlines by name. Extending one is cheap: its old entry is corrected when it surfaces."""

    __slots__ = ("_at", "_heap", "_queued")

    def __init__(self) -> None:
        self._heap: list[tuple[float, Name]] = []
        self._at: dict[Name, float] = {}
        self._queued: dict[Name, float] = {}

    def __contains__(self, name: Name) -> bool:
        return name in self._at

    def set(self, name: Name, at: float) -> None:
        """Set the deadline of ``name``, in place of any earlier one."""
        self._at[name] = at
        queued = self._queued.get(name)
        if queued is None or at < queued:
            self._push(name, at)

    def cancel(self, name: Name) -> None:
        """Remove the deadline of ``name``, if there is one."""
        self._at.pop(name, None)
        if len(self._heap) > 2 * len(self._at) + _SLACK:
            live = list(self._at.items())
            self._heap, self._queued = [], {}
            for each, at in live:
                self._push(each, at)

    def next(self) -> float | None:
        """Return the next deadline."""
        while self._heap:
            at, name = self._heap[0]
            due = self._at.get(name)
            if due == at:
                return at
            heapq.heappop(self._heap)
            if self._queued.get(name) == at:
                del self._queued[name]
                if due is not None:
                    self._push(name, due)
        return None

    def due(self, now: float) -> Iterator[Name]:
        """Remove and yield, in order, every name that is due at ``now``."""
        while (at := self.next()) is not None and at <= now:
            name = heapq.heappop(self._heap)[1]
            self._queued.pop(name, None)
            del self._at[name]
            yield name

    def _push(self, name: Name, at: float) -> None:
        self._queued[name] = at
        heapq.heappush(self._heap, (at, name))
