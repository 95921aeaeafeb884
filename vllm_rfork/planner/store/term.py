"""One term of a leading replica: the fleet in memory, and the writes of its changes to Redis.

A decision is made in memory at once, and answered when Redis has what it changed. Decisions that are made during a
write share the next one, so that they share the cost of a round trip. A write that fails ends the term: Redis then has
the valid state, and this process must read it again before it decides anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from vllm_rfork.planner.store.base import Event, Store
from vllm_rfork.planner.store.errors import FENCED, NOT_LEADER, StoreError, StoreUnavailable
from vllm_rfork.planner.store.fenced import Change, Fenced, FencedRecords, lock_changes
from vllm_rfork.planner.store.journal import Journal
from vllm_rfork.planner.store.memory import MemoryStore

logger = logging.getLogger(__name__)
T = TypeVar("T")
#: Maximum number of calls that wait for a write.
MAX_CALLS = 50_000


class Term:
    """The time in which this process leads under ``token``.

    Args:
        memory: the fleet; ``journal`` notes what changes in it.
        clock: the fleet's, written with each change.
        listener: its ``observe`` and ``notify`` are called with what happened, once that is written.
        ended: called once with the reason when the term has ended by itself.
    """

    def __init__(
        self,
        memory: MemoryStore,
        journal: Journal,
        records: FencedRecords,
        token: str,
        *,
        clock: Callable[[], float],
        listener: Store,
        ended: Callable[[StoreUnavailable], None],
    ) -> None:
        self.memory = memory
        self.token = token
        self._journal = journal
        self._records = records
        self._clock = clock
        self._listener = listener
        self._ended = ended
        self._beats = self._written_beats = 0
        self._over: StoreUnavailable | None = None
        self._calls: list[asyncio.Future[None]] = []
        self._effects: list[Callable[[], None]] = []
        self._writer: asyncio.Task[None] | None = None
        memory.observe = self._observe
        memory.notify = self._notify

    async def decide(self, decision: Awaitable[T]) -> T:
        """Make ``decision`` and return its result once it is written. Raises what it raises, or StoreUnavailable."""
        declined: StoreError | None = None
        try:
            result = await decision
        except StoreError as error:
            declined = error
        await self.written()
        if declined is not None:
            raise declined
        return result

    async def written(self) -> None:
        """Return when Redis has everything that was decided so far, while this process led.

        Raises:
            StoreUnavailable: the term is over.
        """
        if self._over is not None:
            raise self._over.again()
        if len(self._calls) >= MAX_CALLS:
            raise StoreUnavailable("too many calls wait for Redis")
        loop = asyncio.get_running_loop()
        call: asyncio.Future[None] = loop.create_future()
        self._calls.append(call)
        if self._writer is None or self._writer.done():
            self._writer = loop.create_task(self._write_all())
        await call

    async def beat(self) -> None:
        """Give the other replicas a sign of life. Raises StoreUnavailable if the term is over."""
        self._beats += 1
        await self.written()

    async def end(self, *, release: bool) -> None:
        """Finish the writes; with ``release`` another replica may take over at once."""
        try:
            if release and self._over is None:
                await self.written()
                await self._records.write(self.token, lock_changes(owner=""))
        except (Fenced, StoreUnavailable) as error:
            logger.debug("The lock was not released: %s", error)
        self.fail(StoreUnavailable("the planner is being stopped", NOT_LEADER))
        if self._writer is not None:
            await asyncio.gather(self._writer, return_exceptions=True)

    def fail(self, reason: StoreUnavailable) -> None:
        """End the term: every call under way raises ``reason``."""
        if self._over is None:
            self._over = reason
            calls, self._calls = self._calls, []
            _resolve(calls, reason)

    async def _write_all(self) -> None:
        while self._calls and self._over is None:
            calls, self._calls = self._calls, []
            effects, self._effects = self._effects, []
            try:
                await self._records.write(self.token, self._changes())
            except Fenced as error:
                self._lose(calls, StoreUnavailable(str(error), FENCED))
                return
            except StoreUnavailable as error:
                self._lose(calls, error)
                return
            except Exception as error:
                logger.exception("A write failed")
                self._lose(calls, StoreUnavailable(f"a write failed ({type(error).__name__})"))
                return
            for effect in effects:
                effect()
            _resolve(calls, None)

    def _changes(self) -> list[Change]:
        """Return what to write: nothing if the proof that this process still leads is all that is needed."""
        changes = self._journal.take()
        if changes or self._beats > self._written_beats:
            # Changes are a sign of life, too.
            self._beats += 1
            self._written_beats = self._beats
            changes += lock_changes(beat=str(self._beats), now=repr(self._clock()))
        return changes

    def _lose(self, calls: list[asyncio.Future[None]], reason: StoreUnavailable) -> None:
        was_over = self._over is not None
        self.fail(reason)
        _resolve(calls, reason)
        if not was_over:
            self._ended(reason)

    def _observe(self, event: Event) -> None:
        self._effects.append(partial(self._listener.observe, event))

    def _notify(self, ticket: str) -> None:
        self._effects.append(partial(self._listener.notify, ticket))


def _resolve(calls: list[asyncio.Future[None]], error: StoreUnavailable | None) -> None:
    for call in calls:
        if call.done():
            continue  # its caller has gone away
        if error is None:
            call.set_result(None)
        else:
            call.set_exception(error.again())
