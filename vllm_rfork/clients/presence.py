"""A request to the planner that is kept open, so that the planner notices at once when this process dies.

The kernel closes the connection with the process, however that ends. The planner then stops granting the seed until its
next announcement or request. So a connection that breaks is replaced at once, and with growing pauses while that fails.
If the planner has no such call, nothing is kept open, and a dead seed is stale after a minute.

Belongs to the coroutines of one :class:`~vllm_rfork.heartbeat.Heartbeat`, which announces and withdraws the seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from vllm_rfork.clients.answers import Attendance, Attended
from vllm_rfork.errors import PlannerError
from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)

#: The first pause after a connection that broke, and the longest, in seconds; each is between half and all of it. The
#: seed is not granted meanwhile, and after a planner's restart all seeds of the fleet come at once.
FIRST_PAUSE_S = 0.4
LONGEST_PAUSE_S = 10.0
#: A request that is answered sooner was not held.
_HELD_S = 1.0
#: This number of requests in a row that were not held, or failed, is worth a line in the log.
_SEVERAL = 3


class Presence:
    """The presence requests of one seed.

    Args:
        attend: sends one, and returns when it is answered.
        announce: makes the heartbeat announce the seed at once.
        full_pause_s: shortest pause after a planner has refused because it holds too many requests.
        clock, sleep, jitter: replaced in tests; ``jitter()`` is a number from 0 to 1.
    """

    def __init__(
        self,
        attend: Callable[[], Awaitable[Attended]],
        announce: Callable[[], None],
        *,
        full_pause_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]],
        jitter: Callable[[], float],
    ) -> None:
        self._attend = attend
        self._announce = announce
        self._full_pause_s = full_pause_s
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._announced = asyncio.Event()
        self._other_planner = asyncio.Event()
        self._pause_s = FIRST_PAUSE_S
        self._in_vain = 0
        self._failures = 0
        self._told_full = False

    def announced(self, *, other_planner: bool) -> None:
        """Note that the planner accepted an announcement. ``other_planner``: it may be another one than before."""
        if other_planner:
            self._other_planner.set()
        self._announced.set()

    async def run(self) -> None:
        """Keep a request open until cancelled; the first follows the first announcement."""
        while True:
            await self._announced.wait()
            # Here, before the request: an announcement that comes later is for the next one.
            self._other_planner.clear()
            started_at = self._clock()
            try:
                attended = await self._attend()
            except PlannerError as error:
                await self._failed(error, held=self._clock() - started_at >= _HELD_S)
                continue
            await self._answered(attended, held=self._clock() - started_at >= _HELD_S)

    async def _answered(self, attended: Attended, *, held: bool) -> None:
        if attended.answer is Attendance.AGAIN and held:
            self._works()
        elif attended.answer is Attendance.AGAIN:
            # Either another connection has replaced this one, or the planner answers 200 to any request.
            self._in_vain += 1
            if self._in_vain >= _SEVERAL:
                await self._not_here()
            else:
                await self._pause()
        elif attended.answer is Attendance.NO_SUCH_CALL:
            await self._not_here()
        elif attended.answer is Attendance.FULL:
            if not self._told_full:
                self._told_full = True
                logger.info("The planner holds no more presence connections: the seed depends on its heartbeats")
            await self._sleep(max(attended.retry_after_s or 0.0, self._full_pause_s) * (1 + self._jitter() / 2))
        else:
            self._announced.clear()
            self._announce()
            await self._pause()

    async def _failed(self, error: PlannerError, *, held: bool) -> None:
        if held:  # it worked until now
            self._works()
        self._failures += 1
        logger.debug("The presence connection broke, trying again: %s", error)
        if self._failures == _SEVERAL:
            logger.warning("No presence connection to the planner, trying again in the background: %s", error)
        await self._pause()

    def _works(self) -> None:
        if self._failures >= _SEVERAL:
            logger.info("The presence connection to the planner works again")
        self._pause_s, self._in_vain, self._failures, self._told_full = FIRST_PAUSE_S, 0, 0, False

    async def _not_here(self) -> None:
        """Wait until the planner may be another one."""
        logger.info("The planner has no presence call: it notices the death of this process within a minute")
        await self._other_planner.wait()
        self._pause_s, self._in_vain = FIRST_PAUSE_S, 0

    async def _pause(self) -> None:
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        await self._sleep(pause_s * (1 + self._jitter()) / 2)
