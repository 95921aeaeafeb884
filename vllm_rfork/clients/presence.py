"""Keeps a request to the planner open, so that the planner sees at once when this process dies.

The kernel closes the connection with the process, however it ends. The planner does not grant the seed from then on,
until it hears of it again. So the connection is made anew as soon as it breaks, and with growing pauses while that
does not work. With a planner that has no such call nothing is kept open: a dead seed is then stale after a minute.

Belongs to the coroutines of one :class:`~vllm_rfork.heartbeat.Heartbeat`. Must not announce or withdraw the seed.
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
#: So many in a row that were not held, or could not be made, are worth a line in the log.
_SEVERAL = 3


class Presence:
    """The presence requests of one seed.

    Args:
        attend: sends one, and returns when it is answered.
        announce: makes the heartbeat announce the seed at once.
        full_pause_s: how long a planner that holds as many requests as it may is left alone, at least.
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
        """The planner has taken an announcement. ``other_planner``: it may be another one than before."""
        if other_planner:
            self._other_planner.set()
        self._announced.set()

    async def run(self) -> None:
        """Keep a request open until cancelled; the first follows the first announcement."""
        while True:
            await self._announced.wait()
            # From here on: what an announcement changes, it changes for the request below.
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
            # Either another connection took over, or this planner answers 200 to everything.
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
                logger.info("The planner holds as many presence connections as it may: the seed lives by heartbeats")
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
        """Return when the planner may be another one."""
        logger.info("The planner has no presence call: when this process dies, it finds out within a minute")
        await self._other_planner.wait()
        self._pause_s, self._in_vain = FIRST_PAUSE_S, 0

    async def _pause(self) -> None:
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        await self._sleep(pause_s * (1 + self._jitter()) / 2)
