"""Announcement of one seed: repeated as long as the seed serves, then withdrawn.

However :meth:`Heartbeat.run` ends, the seed is withdrawn. In addition to the heartbeats there is a presence connection
(``clients/presence.py``), which breaks when this process dies. While a planner does not answer, the log has one line at
the beginning and one at the end. A planner that has lost its state gets the announcement with the next heartbeat.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from vllm_rfork.clients import Attended, Outcome, PlannerClient
from vllm_rfork.clients.presence import Presence
from vllm_rfork.errors import PlannerError
from vllm_rfork.logs.quoting import counted
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import SeedAddress
from vllm_rfork.messages.metering import Served

logger = worker_logger(__name__)

#: A heartbeat follows after this share of the interval to all of it, so that a fleet's heartbeats spread out.
_EARLIEST = 0.8
#: After a failed heartbeat the next one follows after this share of the interval: planners drop a seed after two.
_AFTER_FAILURE = 1 / 3
#: Time that a withdrawal waits for a heartbeat under way, in seconds. After that the heartbeat is cancelled: the bytes
#: are about to change, and the planner drops a seed whose heartbeats stop.
_PATIENCE_S = 0.5
_CANCEL_AGAIN_S = 0.1


class Heartbeat:
    """The announcement of one seed under one epoch; a new epoch needs a new object.

    Args:
        client: of the planner to announce to.
        interval_s: longest time between two heartbeats in seconds.
        fingerprint, epoch, slots, labels, intent, parent: see :meth:`PlannerClient.announce`.
        caches, differs: return the texts of these names, which may be known only after the first announcement.
        served: called with the number of further forks from the seed, and their bytes, when the planner reports some.
        clock, sleep, jitter: replaced in tests; ``jitter()`` is a number from 0 to 1.
    """

    def __init__(
        self,
        client: PlannerClient,
        seed_key: str,
        seed: SeedAddress,
        *,
        interval_s: float,
        fingerprint: str,
        epoch: str,
        slots: int | None = None,
        labels: str = "",
        intent: str = "",
        caches: Callable[[], str] = str,
        parent: str = "",
        differs: Callable[[], str] = str,
        served: Callable[[int, int], object] = lambda forks, nbytes: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.seed_key = seed_key
        self.seed = seed
        self._client = client
        self._interval_s = interval_s
        self._fingerprint = fingerprint
        self._epoch = epoch
        self._slots = slots
        self._labels = labels
        self._intent = intent
        self._caches = caches
        self._parent = parent
        self._differs = differs
        self._served = served
        self._reported = Served(0, 0)
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._withdrawing = asyncio.Lock()
        self._announcing: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._attempted = False
        self._withdrawn: Outcome | None = None
        self._announced = False
        self._first = True
        self._missed = 0
        self._state = ""
        self._beat_now = asyncio.Event()
        self._presence = Presence(
            self._attend, self._beat_now.set, full_pause_s=interval_s, clock=clock, sleep=sleep, jitter=jitter
        )
        self._attending: asyncio.Task[None] | None = None

    @property
    def announced(self) -> bool:
        """True if the planner accepted the latest heartbeat."""
        return self._announced

    def soon(self) -> None:
        """Announce again as soon as possible; called in the loop."""
        self._beat_now.set()

    async def run(self) -> None:
        """Announce at once, then repeat it until cancelled or withdrawn; withdraw at the end."""
        self._attending = asyncio.create_task(self._presence.run())
        try:
            while not self._over.is_set():
                started_at = self._clock()
                self._beat_now.clear()
                await self._beat()
                await self._pause(self._delay_s() - (self._clock() - started_at))
        finally:
            try:
                await self.withdraw()
            except PlannerError as error:
                logger.warning("seed %s could not be withdrawn; the planner forgets it later: %s", self.seed, error)

    async def withdraw(self) -> Outcome:
        """Withdraw the seed and end :meth:`run`; no heartbeat follows. A second call returns the first outcome.

        Takes at most the client's ``request_timeout_s`` and half a second.

        Returns:
            ``DRAINING`` if a receiver is still reading from the seed.

        Raises:
            PlannerError: the planner did not confirm it. No heartbeat follows in any case, so the planner drops the
                seed after a minute; a later call tries again.
        """
        self._over.set()
        async with self._withdrawing:
            try:
                if self._withdrawn is None:
                    self._withdrawn = await self._withdraw_once()
                    self._announced = False
            finally:
                # Last: to the planner, a connection that breaks earlier means that the process has died.
                await self._end_presence()
            return self._withdrawn

    async def _end_presence(self) -> None:
        attending, self._attending = self._attending, None
        if attending is not None:
            while not attending.done():
                # In a loop: a library may lose a cancellation, as asyncio.wait_for() does before Python 3.12.
                attending.cancel()
                await asyncio.wait({attending}, timeout=_CANCEL_AGAIN_S)
            if not attending.cancelled() and (error := attending.exception()) is not None:
                logger.error("The presence connection ended with an error", exc_info=error)

    async def _attend(self) -> Attended:
        return await self._client.attend(
            self.seed_key, self.seed, fingerprint=self._fingerprint, labels=self._labels, epoch=self._epoch
        )

    async def _withdraw_once(self) -> Outcome:
        if not self._attempted:
            return Outcome.UNKNOWN
        announcing = self._announcing
        if announcing is not None:
            # If it reached the planner after the withdrawal, the seed would be back.
            await asyncio.wait({announcing}, timeout=_PATIENCE_S)
            announcing.cancel()
        outcome = await self._client.withdraw(self.seed_key, self.seed)
        logger.info("seed %s withdrawn from the planner (%s)", self.seed, outcome.value)
        return outcome

    async def _beat(self) -> None:
        """Announce once; a cancelled run leaves the announcement to :meth:`withdraw`."""
        if self._over.is_set():
            return
        self._attempted = True
        self._announcing = announcing = asyncio.create_task(self._announce())
        await asyncio.wait({announcing})
        self._announcing = None
        if not announcing.cancelled():
            announcing.result()  # raises any error that is not a planner's

    async def _announce(self) -> None:
        try:
            served = await self._client.announce(
                self.seed_key,
                self.seed,
                fingerprint=self._fingerprint,
                slots=self._slots,
                labels=self._labels,
                epoch=self._epoch,
                intent=self._intent,
                caches=self._caches(),
                parent=self._parent,
                differs=self._differs(),
            )
        except PlannerError as error:
            self._announced = False
            self._missed += 1
            if self._missed == 1:
                logger.warning("seed %s is not announced, trying again in the background: %s", self.seed, error)
            return
        if self._missed:
            logger.info("seed %s is announced again, after %s", self.seed, counted(self._missed, "missed heartbeat"))
        elif self._first:
            logger.info("seed %s announced, key %s", self.seed, self.seed_key)
        if served is not None:
            self._count(served)
        # After another state, or missed heartbeats, it may be another planner, with other calls.
        state = self._client.state_of(self.seed)
        self._presence.announced(other_planner=bool(self._missed) or state != self._state)
        self._state = state
        self._first = False
        self._announced = True
        self._missed = 0

    def _count(self, served: Served) -> None:
        """Report what has been served since the last heartbeat. Lower totals are those of a planner that restarted."""
        last, self._reported = self._reported, served
        if served.forks < last.forks or served.nbytes < last.nbytes:
            last = Served(0, 0)
        if served != last:
            self._served(served.forks - last.forks, served.nbytes - last.nbytes)

    def _delay_s(self) -> float:
        longest_s = self._interval_s if self._announced else self._interval_s * _AFTER_FAILURE
        return longest_s * (_EARLIEST + (1 - _EARLIEST) * self._jitter())

    async def _pause(self, delay_s: float) -> None:
        """Sleep for ``delay_s``, or until the seed is withdrawn or a heartbeat is requested."""
        sleeping = asyncio.ensure_future(self._sleep(max(0.0, delay_s)))
        over = asyncio.ensure_future(self._over.wait())
        wanted = asyncio.ensure_future(self._beat_now.wait())
        try:
            await asyncio.wait({sleeping, over, wanted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (sleeping, over, wanted):
                each.cancel()
