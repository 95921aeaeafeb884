"""Presence connections: requests that this process holds open for as long as the seeds' processes live.

The kernel closes a connection when its process dies, however it dies. A held request whose connection breaks makes its
seed absent at once; one that is answered makes it absent unless the next request follows within a grace. Nothing here
outlives the process: seeds ask again where the planner is new.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from vllm_rfork.planner.store.base import Announcement, LimitReached, Store, StoreError, StoreUnavailable, UnknownSeed
from vllm_rfork.planner.waiting_room import Closing

logger = logging.getLogger(__name__)

#: A request is answered after this and at least four fifths of it, in seconds: proxies give up after 60 s of silence.
HOLD_S = 50.0
_SOONEST = 0.8
#: Of all connections, those that may be presence: the other calls must always find some.
SHARE = 0.5
#: A host that vanishes closes nothing. Its kernel is asked, and is counted dead after 10 + 3 * 5 seconds of silence. A
#: process that is only stopped has a kernel that answers.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))

AGAIN, UNKNOWN, LOST, LEAVE = "again", "unknown", "lost", "leave"


class Presence:
    """The presence requests of this process. Belongs to one event loop.

    Args:
        max_connections: of the whole planner; ``SHARE`` of them are for presence.
        jitter: a number from 0 to 1; replaced in tests, as is ``hold_s``.
    """

    def __init__(
        self,
        store: Store,
        max_connections: int,
        *,
        hold_s: float = HOLD_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self.share(max_connections)
        self._hold_s = hold_s
        self._jitter = jitter
        self._held: dict[str, asyncio.Future[str]] = {}
        self._count = 0
        self._leaving: set[asyncio.Task[None]] = set()
        self._closing = False
        store.lost = self._lost

    def __len__(self) -> int:
        return self._count

    def share(self, max_connections: int) -> None:
        """Take ``SHARE`` of ``max_connections``, which may be fewer than were asked for."""
        self.limit = max(1, int(max_connections * SHARE))

    async def hold(self, announcement: Announcement, transport: asyncio.BaseTransport | None) -> None:
        """Hold a request of the announced seed; returns when it is to be answered with "again".

        Cancelled when the connection of ``transport`` breaks: the seed is absent from then on.

        Raises:
            UnknownSeed: no such seed, or not any more: it has to be announced first.
            LimitReached: too many requests are held; this seed lives by its heartbeats.
            StoreUnavailable: another replica may decide now, and knows nothing of this request.
            Closing: the planner is being stopped.
        """
        if self._closing:
            raise Closing
        name = str(announcement.seed)
        if self._count >= self.limit and name not in self._held:
            await self._store.attend(announcement, held=False)
            raise LimitReached(f"{self._count} presence connections are held already")
        number = await self._attend(announcement)
        _watch_host(transport)
        earlier = self._held.get(name)
        if earlier is not None and not earlier.done():
            earlier.set_result(AGAIN)
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._held[name] = answer
        self._count += 1
        word, answered = "", False
        try:
            word = await self._answer(answer)
            answered = True
        finally:
            self._count -= 1
            if self._held.get(name) is answer:
                del self._held[name]
            if word != LOST:  # else ``number`` means nothing to whoever decides now
                self._in_background(self._leave(announcement, number, answered=answered))
        if word == UNKNOWN:
            raise UnknownSeed(f"the seed {name} is not known any more: announce it again")
        if word == LOST:
            raise StoreUnavailable("this replica leads no longer: ask again")
        if word == LEAVE:
            raise Closing

    async def _attend(self, announcement: Announcement) -> int:
        """Tell the store; where the connection breaks meanwhile, tell it that as well."""
        attending = asyncio.ensure_future(self._store.attend(announcement, held=True))
        try:
            return await asyncio.shield(attending)
        except asyncio.CancelledError:
            self._in_background(self._leave_after(announcement, attending))
            raise

    async def _leave_after(self, announcement: Announcement, attending: asyncio.Future[int]) -> None:
        try:
            number = await attending
        except StoreError as error:
            logger.debug("A presence connection broke before it counted: %s", error)
            return
        await self._leave(announcement, number, answered=False)

    async def _answer(self, answer: asyncio.Future[str]) -> str:
        held_s = self._hold_s * (_SOONEST + (1 - _SOONEST) * self._jitter())
        try:
            return await asyncio.wait_for(answer, held_s)
        except asyncio.TimeoutError:
            return AGAIN

    async def _leave(self, announcement: Announcement, number: int, *, answered: bool) -> None:
        try:
            await self._store.leave(announcement.seed, number, answered=answered)
        except StoreError as error:
            logger.debug("The end of a presence connection was not noted: %s", error)

    def seed_dropped(self, name: str) -> None:
        """The seed called ``name`` is not known any more: let its worker announce it again, if it lives."""
        answer = self._held.get(name)
        if answer is not None and not answer.done():
            answer.set_result(UNKNOWN)

    def close(self) -> None:
        """Send everybody to another planner, or to this one after its restart."""
        self._closing = True
        self._answer_all(LEAVE)

    def _lost(self) -> None:
        """Whoever decides from now on expects new requests soon, and would find living seeds absent."""
        self._answer_all(LOST)

    def _answer_all(self, word: str) -> None:
        for answer in list(self._held.values()):
            if not answer.done():
                answer.set_result(word)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)


def _watch_host(transport: asyncio.BaseTransport | None) -> None:
    """Let the kernel find out when the other side's host is gone. Best effort: a re-request is missed later."""
    found = None if transport is None else transport.get_extra_info("socket")
    if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
        return
    # A socket of our own for the same connection: uvloop's stands for one and has no options.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fileno())) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
