"""A clock that tests turn by hand: nobody sleeps, and what waits is visible."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

#: Turns of the loop given to everything that can run without time passing; real sockets need some.
_DEADLINE_S = 10.0


class VirtualTime:
    """``clock`` and ``sleep`` for code that takes them; :meth:`advance` lets time pass."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked_s: list[float] = []
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.asked_s.append(delay_s)
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now_s + delay_s, next(self._numbers), waiting))
        await waiting

    @property
    def asleep(self) -> int:
        return sum(not sleeper[2].done() for sleeper in self._sleepers)

    async def advance(self, seconds: float) -> None:
        """Wake, in order, everything that is due within ``seconds``, letting each run until it sleeps again."""
        until_s = self.now_s + seconds
        while self._sleepers and self._sleepers[0][0] <= until_s:
            due_s, _, waiting = heapq.heappop(self._sleepers)
            if waiting.done():
                continue
            self.now_s = max(self.now_s, due_s)
            waiting.set_result(None)
            await self.settle()
        self.now_s = until_s

    async def settle(self) -> None:
        """Run what can run without time passing; for code that does not touch sockets."""
        for _ in range(50):
            await asyncio.sleep(0)


async def until(condition: Callable[[], object], what: str) -> None:
    """Let the loop turn until ``condition()``; real sockets and threads included."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _DEADLINE_S
    while not condition():
        if loop.time() > deadline:
            raise AssertionError(f"it never came true: {what}")
        await asyncio.sleep(0.001)
