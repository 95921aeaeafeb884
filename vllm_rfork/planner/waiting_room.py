"""Receivers that wait for a seed in this process: futures that the store's notifications resolve.

The order of the line is the store's; this room only holds the requests open, bounded by each one's wait, and
makes sure that a receiver that goes away leaves neither a place in the line nor a lease behind.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Coroutine
from typing import Any

from vllm_rfork import messages
from vllm_rfork.planner.store.base import (
    Ask,
    Granted,
    Missed,
    Queued,
    Store,
    StoreError,
    StoreUnavailable,
    UnknownLease,
)

logger = logging.getLogger(__name__)


class Closing(Exception):
    """The planner is being stopped: the receiver should ask again, or load from storage."""


class _Bell:
    """Rings once per notification, also before anybody listens. Lighter than an event: ten thousand may wait."""

    __slots__ = ("_future", "_rung")

    def __init__(self) -> None:
        self._rung = False
        self._future: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self._rung = True
        self._wake()

    async def rings_before(self, deadline: float) -> bool:
        """Whether it has rung since the last call, or does before ``deadline`` on the loop's clock."""
        if not self._rung:
            loop = asyncio.get_running_loop()
            self._future = loop.create_future()
            timer = loop.call_at(deadline, self._wake)
            try:
                await self._future
            finally:
                timer.cancel()
                self._future = None
        rung, self._rung = self._rung, False
        return rung

    def _wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class WaitingRoom:
    """Those who wait at this planner process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._bells: dict[str, _Bell] = {}
        self._cleanups: set[asyncio.Task[None]] = set()
        self._closing = False
        store.notify = self._ring
        store.notify_all = self._ring_all

    def __len__(self) -> int:
        return len(self._bells)

    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """Ask the store, and wait in line where it says so.

        A receiver that keeps its ticket waits here for :data:`messages.SLICE_S` at most, and not at all at first; where
        it has to ask again, the result is :class:`Queued`.

        Raises:
            Closing: :meth:`close` was called while this receiver waited.
            StoreUnavailable: the store could not decide.
        """
        if ask.keeps:
            return await self._slice(ask)
        if ask.wait_s <= 0:
            result = await self._store.acquire(ask)
            if isinstance(result, Queued):
                raise AssertionError("the store queued a receiver that does not wait")
            return result
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ask.wait_s
        while True:
            left_s = 0.0 if self._closing else max(0.0, deadline - loop.time())
            settled = await self._acquire_once(
                dataclasses.replace(ask, wait_s=left_s, ticket=secrets.token_hex(12)), deadline
            )
            if settled is not None:
                return settled
            # The lease that this place in the line was given is gone again (its seed died): line up anew.

    async def _acquire_once(self, ask: Ask, deadline: float) -> Granted | Missed | None:
        bell = self._bells[ask.ticket] = _Bell()
        finished = False
        try:
            result: Granted | Missed | Queued | None = await self._store.acquire(ask)
            while isinstance(result, Queued):
                leave = self._closing or not await bell.rings_before(deadline) or self._closing
                closing = self._closing
                result = await self._store.settle(ask.ticket, leave=leave, loads=not closing)
                if leave and closing and not isinstance(result, Granted):
                    raise Closing
            finished = True
            return result
        except StoreUnavailable:
            finished = True  # another replica leads now, and has no line
            raise
        finally:
            del self._bells[ask.ticket]
            if not finished and not self._closing:
                # Cancelled (the receiver hung up): nobody must stay behind in the line.
                self._in_background(self._abandon(ask.ticket))

    async def _slice(self, ask: Ask) -> Granted | Missed | Queued:
        loop = asyncio.get_running_loop()
        bell = _Bell()
        self._bells[ask.ticket] = bell  # of two questions with one ticket, the later one is the receiver's
        finished = False
        try:
            result: Granted | Missed | Queued | None = await self._store.acquire(ask)
            if isinstance(result, Queued) and not result.parked:
                place, deadline = result, loop.time() + min(messages.SLICE_S, result.left_s)
                while isinstance(result, Queued) and not result.parked and not self._closing:
                    if await bell.rings_before(deadline):
                        result = await self._store.settle(ask.ticket, leave=False)
                    elif self._bells.get(ask.ticket) is bell:
                        result = await self._store.park(ask.ticket)
                    else:
                        result = place  # superseded: nobody reads this answer
                        break
            if isinstance(result, Queued) and self._closing:
                raise Closing
            finished = True
            if result is None:
                # The place in the line was given a lease that is gone again (its seed died).
                return await self._store.acquire(ask)
            return result
        except StoreUnavailable:
            finished = True  # another replica leads now, and has no line
            raise
        finally:
            if self._bells.get(ask.ticket) is bell:
                del self._bells[ask.ticket]
                if not finished and not self._closing:
                    self._in_background(self._parked(ask.ticket))

    async def _parked(self, ticket: str) -> None:
        """The receiver has hung up: it keeps its place for a moment, in case only the connection broke."""
        if ticket in self._bells:
            return  # it is back already
        try:
            await self._store.park(ticket, hung_up=True)
        except StoreError as error:
            logger.warning("A receiver that went away stays in line until its wait is over: %s", error)

    async def _abandon(self, ticket: str) -> None:
        try:
            result = await self._store.settle(ticket, leave=True, loads=False)
            if isinstance(result, Granted):
                await self._store.release(result.seed, result.user_id, None)
        except UnknownLease:
            logger.debug("The lease of a receiver that went away was gone already")
        except StoreError as error:
            logger.warning("A receiver that went away stays in line until its wait is over: %s", error)

    async def close(self, timeout_s: float) -> None:
        """Send everybody away and take nobody in; returns once they are gone, after ``timeout_s`` at most."""
        self._closing = True
        self._ring_all()
        deadline = asyncio.get_running_loop().time() + timeout_s
        # A stop happens once; polling is simpler than an event that two collections would have to keep.
        while (self._bells or self._cleanups) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def _ring(self, ticket: str) -> None:
        bell = self._bells.get(ticket)
        if bell is not None:
            bell.ring()

    def _ring_all(self) -> None:
        for bell in self._bells.values():
            bell.ring()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)
