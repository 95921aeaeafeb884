"""The Redis store: several planner processes over one Redis. One leads: it decides, and writes every change.

The leader keeps the fleet in memory (``memory``) and answers a decision once Redis has what it changed (``term``). The
other replicas raise :class:`StoreUnavailable`. When the leader is gone, one of them takes over within seconds: it reads
what was written, and gives every lease and every seed its full time again. So no clock of another machine counts, and
the fleet's own clock stands still while nobody leads. Waiting receivers are known to the leader only, and ask again
when it is gone.

Keep Redis's data on disk (``appendfsync always``) if a lost second matters: a slot whose lease Redis forgot can be
granted again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from vllm_rfork.messages import SeedAddress
from vllm_rfork.messages.metering import Served
from vllm_rfork.planner.store.base import (
    Announcement,
    Ask,
    Granted,
    Missed,
    Outcome,
    Queued,
    Released,
    Rules,
    Store,
    Totals,
)
from vllm_rfork.planner.store.errors import StoreUnavailable, UnknownLease
from vllm_rfork.planner.store.fenced import FencedRecords
from vllm_rfork.planner.store.key_use import UNNAMED, KeyNames
from vllm_rfork.planner.store.leadership import Leadership
from vllm_rfork.planner.store.takeover import take_over
from vllm_rfork.planner.store.term import Term

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RedisStore(Store):
    """The fleet of ``prefix`` in the Redis at ``url``.

    Args:
        leader_ttl_s: another replica takes over when the leader was silent for this long.
        clock: this process's monotonic seconds, from which the fleet's clock is made.
    """

    def __init__(
        self,
        rules: Rules,
        url: str,
        *,
        prefix: str = "rfork",
        leader_ttl_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(rules)
        self._clock = clock
        # Timeouts are the callers' (FencedRecords), and nothing below them retries: a write whose answer was lost may
        # have happened. The keys differ from those of the versions that decided in Redis, which may still be there.
        self._client = redis.asyncio.Redis.from_url(
            url, protocol=2, socket_connect_timeout=2.0, health_check_interval=15, retry=Retry(NoBackoff(), 0)
        )
        self.records = FencedRecords(self._client, f"{{{prefix}}}:2:")
        self.leadership = Leadership(self.records, leader_ttl_s, begin=self._begin_term, ended=self._term_ended)
        self._cleanups: set[asyncio.Task[None]] = set()

    @property
    def leads(self) -> bool:
        """This replica decides."""
        return self.leadership.term is not None

    async def open(self) -> None:
        """Connect, and lead if nobody does. Raises :class:`StoreUnavailable`."""
        await self.leadership.open()

    async def close(self) -> None:
        """See the port."""
        await self.leadership.close()
        await self._client.aclose()

    async def ping(self) -> None:
        """See the port."""
        self.leadership.leading()

    async def _begin_term(self, token: str) -> Term:
        new = await take_over(self.records, token, self.rules, self._clock)
        new.memory.lease_ids = self.lease_ids
        return Term(
            new.memory,
            new.journal,
            self.records,
            token,
            clock=new.clock,
            listener=self,
            ended=self.leadership.lose,
        )

    def _term_ended(self, _: StoreUnavailable) -> None:
        self.notify_all()  # those who wait here are sent away
        self.lost()

    # --- decisions -----------------------------------------------------------------------------------------------
    async def announce(self, announcement: Announcement) -> tuple[str, Served]:
        """See the port."""
        term = self.leadership.leading()
        return await term.decide(term.memory.announce(announcement))

    async def withdraw(self, key: str, seed: SeedAddress) -> None:
        """See the port."""
        term = self.leadership.leading()
        await term.decide(term.memory.withdraw(key, seed))

    async def drain(self, key: str, seed: SeedAddress, *, undo: bool) -> int:
        """See the port."""
        term = self.leadership.leading()
        return await term.decide(term.memory.drain(key, seed, undo=undo))

    async def lift(self, key: str, seed: SeedAddress) -> bool:
        """See the port."""
        term = self.leadership.leading()
        return await term.decide(term.memory.lift(key, seed))

    async def find(self, key: str) -> SeedAddress | None:
        """See the port."""
        return await self.leadership.leading().memory.find(key)

    async def attend(self, announcement: Announcement, *, held: bool) -> int:
        """See the port."""
        term = self.leadership.leading()
        return await term.decide(term.memory.attend(announcement, held=held))

    async def leave(self, seed: SeedAddress, number: int, *, answered: bool) -> None:
        """See the port."""
        term = self.leadership.leading()
        await term.decide(term.memory.leave(seed, number, answered=answered))

    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """See the port."""
        term = self.leadership.leading()
        return await self._granted(term, await term.memory.acquire(ask))

    async def settle(self, ticket: str, *, leave: bool, loads: bool = True) -> Granted | Missed | Queued | None:
        """See the port."""
        term = self.leadership.leading()
        return await self._granted(term, await term.memory.settle(ticket, leave=leave, loads=loads))

    async def park(self, ticket: str, *, hung_up: bool = False) -> Granted | Missed | Queued | None:
        """See the port."""
        term = self.leadership.leading()
        return await term.decide(term.memory.park(ticket, hung_up=hung_up))

    async def _granted(self, term: Term, result: T) -> T:
        """Return ``result`` once it is written. A lease whose receiver hangs up meanwhile is released.

        Not one by ticket: its receiver may have asked again already, and is given the same lease.
        """
        try:
            await term.written()
        except asyncio.CancelledError:
            if isinstance(result, Granted) and not result.by_ticket:
                releasing = asyncio.get_running_loop().create_task(_release(term, result))
                self._cleanups.add(releasing)
                releasing.add_done_callback(self._cleanups.discard)
            raise
        return result

    async def release(self, seed: SeedAddress, user_id: str, outcome: Outcome | None) -> Released:
        """See the port."""
        term = self.leadership.leading()
        return await term.decide(term.memory.release(seed, user_id, outcome))

    async def renew(self, seed: SeedAddress, user_id: str) -> None:
        """See the port."""
        term = self.leadership.leading()
        await term.decide(term.memory.renew(seed, user_id))

    async def intend(
        self, key: str, intent: str, fingerprint: str, ttl_s: float, *, names: KeyNames = UNNAMED, address: str = ""
    ) -> None:
        """See the port."""
        term = self.leadership.leading()
        await term.decide(term.memory.intend(key, intent, fingerprint, ttl_s, names=names, address=address))

    async def sweep(self) -> float:
        """See the port."""
        term = self.leadership.term
        return float("inf") if term is None else await term.decide(term.memory.sweep())

    # --- for people ----------------------------------------------------------------------------------------------
    async def totals(self) -> dict[str, Totals]:
        """See the port."""
        return await self.leadership.leading().memory.totals()

    def names_of(self, key: str) -> KeyNames:
        """See the port."""
        term = self.leadership.term
        return UNNAMED if term is None else term.memory.names_of(key)

    async def snapshot_slices(
        self, *, key: str | None = None, limit: int = 1000
    ) -> AsyncIterator[tuple[str, str | float | list[Any] | dict[str, Any]]]:
        """See the port."""
        async for part in self.leadership.leading().memory.snapshot_slices(key=key, limit=limit):
            yield part

    async def overview(
        self, *, key: str | None = None, names: KeyNames | None = None, find: str = "", limit: int = 100
    ) -> dict[str, Any]:
        """See the port."""
        return await self.leadership.leading().memory.overview(key=key, names=names, find=find, limit=limit)


async def _release(term: Term, lease: Granted) -> None:
    try:
        await term.decide(term.memory.release(lease.seed, lease.user_id, None))
    except (UnknownLease, StoreUnavailable) as error:
        logger.debug("The lease of a receiver that hung up is gone already: %s", error)
