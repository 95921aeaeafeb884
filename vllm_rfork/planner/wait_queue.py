"""Receivers that wait for a seed in this process: open requests that the store's notifications answer.

The order of the queue is the store's. This module holds the requests open, bounded by each one's wait, and makes sure
that a receiver that hangs up leaves neither a place in the queue nor a lease behind.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
from collections.abc import Coroutine
from typing import Any

from vllm_rfork import messages
from vllm_rfork.planner.store.base import Ask, Granted, Missed, Queued, Store
from vllm_rfork.planner.store.errors import StoreError, StoreUnavailable, UnknownLease

logger = logging.getLogger(__name__)


class Closing(Exception):
    """The planner is being stopped: the receiver should ask again, or load from storage."""


class _Wakeup:
    """Wakes one request up, also before it waits. Lighter than an event: ten thousand may wait."""

    __slots__ = ("_future", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._future: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._is_set = True
        self._wake()

    async def is_set_before(self, deadline: float) -> bool:
        """Return whether it was set since the last call, or is before ``deadline`` on the loop's clock."""
        if not self._is_set:
            loop = asyncio.get_running_loop()
            self._future = loop.create_future()
            timer = loop.call_at(deadline, self._wake)
            try:
                await self._future
            finally:
                timer.cancel()
                self._future = None
        was_set, self._is_set = self._is_set, False
        return was_set

    def _wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)


class WaitQueue:
    """The receivers that wait at this planner process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wakeups: dict[str, _Wakeup] = {}
        self._cleanups: set[asyncio.Task[None]] = set()
        self._closing = False
        store.notify = self._wake
        store.notify_all = self._wake_all

    def __len__(self) -> int:
        return len(self._wakeups)

    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """Ask the store, and wait if it answers so.

        A receiver that keeps its ticket waits here for at most :data:`messages.SLICE_S`, and not at all at first. If it
        has to ask again, the result is :class:`Queued`.

        Raises:
            Closing: :meth:`close` was called, and this receiver would have to wait.
            StoreUnavailable: the store could not decide.
        """
        if ask.keeps:
            return await self._acquire_by_ticket(ask)
        if ask.wait_s <= 0:
            result = await self._store.acquire(ask)
            if isinstance(result, Queued):
                raise AssertionError("the store queued a receiver that does not wait")
            return result
        if self._closing:
            raise Closing
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ask.wait_s
        while True:
            left_s = 0.0 if self._closing else max(0.0, deadline - loop.time())
            settled = await self._acquire_once(
                dataclasses.replace(ask, wait_s=left_s, ticket=secrets.token_hex(12)), deadline
            )
            if settled is not None:
                return settled
            # The lease that this place in the queue got is gone again (its seed died): start over.

    async def _acquire_once(self, ask: Ask, deadline: float) -> Granted | Missed | None:
        wakeup = self._wakeups[ask.ticket] = _Wakeup()
        finished = False
        try:
            result: Granted | Missed | Queued | None = await self._store.acquire(ask)
            while isinstance(result, Queued):
                leave = self._closing or not await wakeup.is_set_before(deadline) or self._closing
                closing = self._closing
                result = await self._store.settle(ask.ticket, leave=leave, loads=not closing)
                if leave and closing and not isinstance(result, Granted):
                    raise Closing
            finished = True
            return result
        except StoreUnavailable:
            finished = True  # another replica leads now, and has no queue
            raise
        finally:
            del self._wakeups[ask.ticket]
            if not finished and not self._closing:
                # Cancelled (the receiver hung up): nobody must stay behind in the queue.
                self._in_background(self._abandon(ask.ticket))

    async def _acquire_by_ticket(self, ask: Ask) -> Granted | Missed | Queued:
        loop = asyncio.get_running_loop()
        wakeup = _Wakeup()
        self._wakeups[ask.ticket] = wakeup  # of two requests with one ticket, the later one counts
        finished = False
        try:
            result: Granted | Missed | Queued | None = await self._store.acquire(ask)
            if isinstance(result, Queued) and not result.parked:
                place, deadline = result, loop.time() + min(messages.SLICE_S, result.left_s)
                while isinstance(result, Queued) and not result.parked and not self._closing:
                    if await wakeup.is_set_before(deadline):
                        result = await self._store.settle(ask.ticket, leave=False)
                    elif self._wakeups.get(ask.ticket) is wakeup:
                        result = await self._store.park(ask.ticket)
                    else:
                        result = place  # superseded: nobody reads this answer
                        break
            if isinstance(result, Queued) and self._closing:
                raise Closing
            finished = True
            if result is None:
                # The lease that this place in the queue got is gone again (its seed died).
                return await self._store.acquire(ask)
            return result
        except StoreUnavailable:
            finished = True  # another replica leads now, and has no queue
            raise
        finally:
            if self._wakeups.get(ask.ticket) is wakeup:
                del self._wakeups[ask.ticket]
                if not finished and not self._closing:
                    self._in_background(self._parked(ask.ticket))

    async def _parked(self, ticket: str) -> None:
        """Keep the place of a receiver that hung up for a moment, in case only the connection broke."""
        if ticket in self._wakeups:
            return  # it is back already
        try:
            await self._store.park(ticket, hung_up=True)
        except StoreError as error:
            logger.warning("A receiver that hung up stays in the queue until its wait is over: %s", error)

    async def _abandon(self, ticket: str) -> None:
        try:
            result = await self._store.settle(ticket, leave=True, loads=False)
            if isinstance(result, Granted):
                await self._store.release(result.seed, result.user_id, None)
        except UnknownLease:
            logger.debug("The lease of a receiver that hung up was gone already")
        except StoreError as error:
            logger.warning("A receiver that hung up stays in the queue until its wait is over: %s", error)

    async def close(self, timeout_s: float) -> None:
        """Send everybody away and accept nobody; returns once they are gone, after at most ``timeout_s``."""
        self._closing = True
        self._wake_all()
        deadline = asyncio.get_running_loop().time() + timeout_s
        # A stop happens once; polling is simpler than an event that two collections would have to keep.
        while (self._wakeups or self._cleanups) and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def _wake(self, ticket: str) -> None:
        wakeup = self._wakeups.get(ticket)
        if wakeup is not None:
            wakeup.set()

    def _wake_all(self) -> None:
        for wakeup in self._wakeups.values():
            wakeup.set()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._cleanups.add(task)
        task.add_done_callback(self._cleanups.discard)
