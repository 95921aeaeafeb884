"""Presence connections: requests that the planner holds open while the seeds' processes live.

The kernel closes a connection when its process dies, however it dies. A held request whose connection breaks makes its
seed absent at once; one that is answered makes it absent unless the next request follows within a grace. Nothing here
outlives the planner's process: seeds send new requests to a new planner.

No connection is silent for longer than :data:`SILENT_S`. A client that states it (``RFORK-STREAM``) gets a byte in time
and keeps its request for minutes; any other gets its answer by then, and asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import random
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.connection import Connection
from vllm_rfork.net.long_lived import probe_host
from vllm_rfork.planner.http.held import AGAIN, LEAVE, LOST, UNKNOWN, HeldConnection, HeldRequest
from vllm_rfork.planner.store.base import Announcement, Store
from vllm_rfork.planner.store.errors import NOT_LEADER, LimitReached, StoreError, StoreUnavailable, UnknownSeed
from vllm_rfork.planner.wait_queue import Closing

logger = logging.getLogger(__name__)

#: Longest silence on a presence connection, in seconds; proxies and NATs close those that are silent for longer.
SILENT_S = 20.0
#: A request is answered after this, and at least four fifths of it, in seconds. One without bytes meanwhile is answered
#: after :data:`SILENT_S`.
HOLD_S = 300.0
_SOONEST = 0.8
#: A byte is due after this share of :data:`SILENT_S`; it is sent within half of the rest, at most a second.
_DUE = 0.92
#: Connections that get their byte before other work of the event loop has its turn.
_BATCH = 50
#: Of all connections, those that may be presence: the other calls must always find some.
SHARE = 0.5


class Presence:
    """The presence requests of this process. Belongs to one event loop.

    Args:
        max_connections: of the whole planner; ``SHARE`` of them are for presence.
        hold_s, silent_s, jitter: replaced in tests; ``jitter()`` is a number from 0 to 1.
    """

    def __init__(
        self,
        store: Store,
        max_connections: int,
        *,
        hold_s: float = HOLD_S,
        silent_s: float = SILENT_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._hold_s = hold_s
        self.share(max_connections)
        self._silent_s = silent_s
        self._jitter = jitter
        self._held: dict[str, HeldRequest | HeldConnection] = {}
        # Connections and when their next byte is due, the first due first.
        self._due: dict[HeldConnection, float] = {}
        self._beating: asyncio.Task[None] | None = None
        self._count = 0
        #: Requests about which the store decides. After a takeover thousands come at once.
        self._deciding = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        store.lost = self._lost

    def __len__(self) -> int:
        return self._count

    def share(self, max_connections: int, longest_s: float = HOLD_S) -> None:
        """Use ``SHARE`` of ``max_connections``, which may be fewer than were asked for, each ``longest_s`` at most."""
        self.limit = max(1, int(max_connections * SHARE))
        self._hold_s = min(self._hold_s, longest_s)

    async def hold(
        self,
        announcement: Announcement,
        transport: asyncio.BaseTransport | None,
        connection: Connection | None = None,
    ) -> None:
        """Hold a request of the announced seed; returns when it is to be answered with "again".

        Cancelled when the connection of ``transport`` breaks: the seed is absent from then on. With a ``connection``,
        to which bytes may be sent meanwhile, returns as soon as it is held: the rest of the answer is sent from here,
        and the caller is cancelled.

        Raises:
            UnknownSeed: no such seed, or not any more: it has to be announced first.
            LimitReached: too many requests are held; this seed lives by its heartbeats.
            StoreUnavailable: another replica may decide now, and does not have this request.
            Closing: the planner is being stopped.
        """
        if self._closing:
            raise Closing
        name = str(announcement.seed)
        if self._count + self._deciding >= self.limit and name not in self._held:
            await self._store.attend(announcement, held=False)
            raise LimitReached(f"{self._count} presence connections are held already")
        self._deciding += 1
        try:
            number = await self._attend(announcement)
        finally:
            self._deciding -= 1
        _watch_host(transport)
        if (earlier := self._held.get(name)) is not None:
            earlier.end(AGAIN)
        self._count += 1
        if connection is not None:
            self._stream(connection, announcement.seed, number)
            return
        held = self._held[name] = HeldRequest()
        word = ""
        try:
            word = await self._answer(held)
        finally:
            self._ended(held, announcement.seed, number, word)
        if word == UNKNOWN:
            raise UnknownSeed(f"the seed {name} is not known any more: announce it again")
        if word == LOST:
            raise StoreUnavailable("this replica leads no longer: ask again", NOT_LEADER)
        if word == LEAVE:
            raise Closing

    async def _answer(self, held: HeldRequest) -> str:
        if self._closing:
            return LEAVE
        try:
            return await asyncio.wait_for(held.word, self._held_s(min(self._hold_s, self._silent_s)))
        except asyncio.TimeoutError:
            return AGAIN

    def _held_s(self, longest_s: float) -> float:
        return longest_s * (_SOONEST + (1 - _SOONEST) * self._jitter())

    def _ended(self, held: HeldRequest | HeldConnection, seed: SeedAddress, number: int, word: str) -> None:
        self._count -= 1
        name = str(seed)
        if self._held.get(name) is held:
            del self._held[name]
        if word != LOST:  # else ``number`` means nothing to the process that decides now
            self._in_background(self._leave(seed, number, answered=bool(word)))

    # --- answers in pieces ---------------------------------------------------------------------------------------

    def _stream(self, connection: Connection, seed: SeedAddress, number: int) -> None:
        ends_at = asyncio.get_running_loop().time() + self._held_s(self._hold_s)
        held = HeldConnection(connection, seed, number, ends_at, self._stream_ended)
        self._held[str(seed)] = held
        self._due[held] = self._next_byte_at()
        if self._beating is None:
            self._beating = self._in_background(self._beat())
        held.begin()
        if self._closing:
            held.end(LEAVE)

    def _stream_ended(self, held: HeldConnection, word: str) -> None:
        self._due.pop(held, None)
        self._ended(held, held.seed, held.number, word)

    def _next_byte_at(self) -> float:
        return asyncio.get_running_loop().time() + self._silent_s * _DUE

    async def _beat(self) -> None:
        """Send bytes to the connections that are due, and end those that were held long enough, until none is left."""
        tick_s = min(1.0, self._silent_s * (1 - _DUE) / 2)
        try:
            while self._due:
                await asyncio.sleep(tick_s)
                await self._send_due_bytes()
        finally:
            self._beating = None

    async def _send_due_bytes(self) -> None:
        now = asyncio.get_running_loop().time()
        for sent in itertools.count(1):
            held, due_at = next(iter(self._due.items()), (None, 0.0))
            if held is None or due_at > now:
                return
            del self._due[held]
            if held.ends_at <= now:
                held.end(AGAIN)
            else:
                held.beat()
                self._due[held] = self._next_byte_at()
            if sent % _BATCH == 0:
                await asyncio.sleep(0)

    # --- the store -----------------------------------------------------------------------------------------------

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
        await self._leave(announcement.seed, number, answered=False)

    async def _leave(self, seed: SeedAddress, number: int, *, answered: bool) -> None:
        try:
            await self._store.leave(seed, number, answered=answered)
        except StoreError as error:
            logger.debug("The end of a presence connection was not noted: %s", error)

    def seed_dropped(self, name: str) -> None:
        """The seed called ``name`` is not known any more: its worker has to announce it again, if it lives."""
        if (held := self._held.get(name)) is not None:
            held.end(UNKNOWN)

    def close(self) -> None:
        """Send everybody to another planner, or to this one after its restart."""
        self._closing = True
        self._answer_all(LEAVE)

    def _lost(self) -> None:
        """Send the seeds away: the next leader expects their requests soon, and marks them absent otherwise."""
        self._answer_all(LOST)

    def _answer_all(self, word: str) -> None:
        for held in list(self._held.values()):
            held.end(word)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _watch_host(transport: asyncio.BaseTransport | None) -> None:
    """Have the kernel notice when the other host is gone. Best effort: the next request is missing later."""
    found = None if transport is None else transport.get_extra_info("socket")
    if found is None or found.family not in (socket.AF_INET, socket.AF_INET6):
        return
    # A socket of our own for the same connection: uvloop's stands for one and has no options.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fileno())) as connection:
        probe_host(connection)
