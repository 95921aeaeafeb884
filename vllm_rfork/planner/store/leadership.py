"""The lock over the fleet in Redis: taken when nobody leads, and kept with signs of life."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable

from vllm_rfork.planner.store.errors import NOT_LEADER, StoreUnavailable
from vllm_rfork.planner.store.fenced import Fenced, FencedRecords, Lock, lock_changes
from vllm_rfork.planner.store.term import Term

logger = logging.getLogger(__name__)

#: The leader gives a sign of life, and the others look for one, this many times within ``ttl_s``.
_LOOKS = 6


class Leadership:
    """Decides whether this replica leads.

    Args:
        ttl_s: another replica takes over when the leader was silent for this long.
        begin: reads the fleet and begins a term under the token that it is given.
        ended: called with the reason when a term has ended by itself.
    """

    def __init__(
        self,
        records: FencedRecords,
        ttl_s: float,
        *,
        begin: Callable[[str], Awaitable[Term]],
        ended: Callable[[StoreUnavailable], None],
    ) -> None:
        self._records = records
        self._ttl_s = ttl_s
        self._begin = begin
        self._ended = ended
        self._replica = secrets.token_hex(8)
        self._term: Term | None = None
        self._obstacle = StoreUnavailable("the planner is starting", NOT_LEADER)
        self._campaign: asyncio.Task[None] | None = None
        #: token and beat of the leader as they were last seen to change, and when
        self.seen = ("", "")
        self._seen_at = 0.0

    @property
    def term(self) -> Term | None:
        """The present term; None while this replica does not lead."""
        return self._term

    def leading(self) -> Term:
        """Return the present term. Raises :class:`StoreUnavailable` while this replica does not lead."""
        if self._term is None:
            raise self._obstacle.again()
        return self._term

    async def open(self) -> None:
        """Lead if nobody does, and go on looking. Raises :class:`StoreUnavailable`."""
        try:
            await self.look()
        except StoreUnavailable as error:
            self._obstacle = error.again()
            raise
        if self._term is None:
            logger.info("This replica stands by: another one leads")
        self._campaign = asyncio.create_task(self._campaign_for_ever())

    async def close(self) -> None:
        """End the term, so that another replica may lead at once."""
        await self.stop_looking()
        if self._term is not None:
            term, self._term = self._term, None
            await term.end(release=True)

    async def stop_looking(self) -> None:
        """End the signs of life."""
        campaign, self._campaign = self._campaign, None
        while campaign is not None and not campaign.done():
            # Until Python 3.12, wait_for loses a cancellation that arrives together with the answer: here, an error of
            # Redis at this moment.
            campaign.cancel()
            await asyncio.wait({campaign}, timeout=0.1)

    def lose(self, reason: StoreUnavailable) -> None:
        """Forget the term, which has ended: another replica may have changed the fleet."""
        logger.warning("This replica no longer leads: %s", reason)
        self._term, self._obstacle = None, reason.again()
        self._ended(reason)

    async def _campaign_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / _LOOKS)
            try:
                await self.look()
            except StoreUnavailable as error:
                if self._term is None and str(error) != str(self._obstacle):
                    logger.warning("The store is unavailable, trying again: %s", error)
                    self._obstacle = error.again()
            except Exception:
                logger.exception("The look for a leader failed, trying again")

    async def look(self) -> None:
        """Give a sign of life, or take the lock if its owner is silent. Raises :class:`StoreUnavailable`."""
        if self._term is not None:
            await self._term.beat()
            return
        lock = await self._records.read_lock()
        if lock.owner not in ("", self._replica):
            now = time.monotonic()
            if (lock.token, lock.beat) != self.seen:
                self.seen, self._seen_at = (lock.token, lock.beat), now
            if now - self._seen_at < self._ttl_s:
                self._obstacle = StoreUnavailable("another replica leads", NOT_LEADER)
                return
        try:
            await self._take(lock)
        except Fenced:
            self._obstacle = StoreUnavailable("another replica leads", NOT_LEADER)

    async def _take(self, lock: Lock) -> None:
        """Take the lock from the owner that ``lock`` names, and begin a term."""
        token = f"{int(lock.token.partition('.')[0] or 0) + 1}.{secrets.token_hex(8)}"
        taken = lock_changes(token=token, owner=self._replica, beat="0")
        await self._records.write(lock.token, taken, beat=lock.beat)
        # From here on nobody else can write: what is read now is complete.
        reading = asyncio.ensure_future(self._begin(token))
        try:
            beats = 0
            while not (await asyncio.wait({reading}, timeout=self._ttl_s / _LOOKS))[0]:
                beats -= 1  # the term itself counts upwards
                await self._records.write(token, lock_changes(beat=str(beats)))
            self._term = reading.result()
        finally:
            reading.cancel()
