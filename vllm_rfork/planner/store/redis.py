"""The Redis store: several planner processes over one Redis, of which one leads, decides, and writes every change.

The leader keeps the fleet in memory (``memory_store``) and answers a decision once Redis has what it changed
(``term``). The other replicas raise :class:`StoreUnavailable`, and take over within seconds when the leader is gone:
they read what was written, and give every lease and every seed its full time again. So no clock of another machine
counts, and the fleet's own clock stands still while nobody leads. Receivers that wait do so at the leader alone, and
ask again when it is gone.

Keep Redis's data on disk (``appendfsync always``) where a lost second matters: a slot whose lease Redis forgot can
be granted again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.store.base import (
    Announcement,
    Ask,
    Granted,
    LimitReached,
    Missed,
    Outcome,
    Queued,
    Released,
    Rules,
    Store,
    StoreUnavailable,
    Totals,
    UnknownLease,
)
from vllm_rfork.planner.store.fenced import LOCK, Change, Fenced, FencedRecords, Lock
from vllm_rfork.planner.store.memory import MemoryStore
from vllm_rfork.planner.store.records import Book, Journal, Place, decode
from vllm_rfork.planner.store.term import Term

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: The leader shows that it lives, and the others look, so many times within the time after which they take over.
_LOOKS = 6


class RedisStore(Store):
    """The fleet of ``prefix`` in the Redis at ``url``.

    Args:
        leader_ttl_s: another replica takes over when the leader was silent for so long.
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
        self._ttl_s = leader_ttl_s
        self._replica = secrets.token_hex(8)
        # Timeouts are the callers' (FencedRecords), and nothing below them retries: a write whose answer was lost may
        # have happened. Other keys than those of the generation that decided in Redis, which may lie there still.
        self._client = redis.asyncio.Redis.from_url(
            url, protocol=2, socket_connect_timeout=2.0, health_check_interval=15, retry=Retry(NoBackoff(), 0)
        )
        self._records = FencedRecords(self._client, f"{{{prefix}}}:2:")
        self._term: Term | None = None
        self._why_not = StoreUnavailable("the planner starts")
        self._campaign: asyncio.Task[None] | None = None
        self._cleanups: set[asyncio.Task[None]] = set()
        #: token and beat of the leader as they were last seen to change, and when
        self._seen = ("", "")
        self._seen_at = 0.0

    @property
    def leads(self) -> bool:
        """This replica decides."""
        return self._term is not None

    async def open(self) -> None:
        """Connect, and lead if nobody does. Raises :class:`StoreUnavailable`."""
        await self._look()
        if self._term is None:
            logger.info("This replica stands by: another one leads")
        self._campaign = asyncio.create_task(self._campaign_for_ever())

    async def close(self) -> None:
        """See the port."""
        campaign, self._campaign = self._campaign, None
        while campaign is not None and not campaign.done():
            # Until Python 3.12, wait_for loses a cancellation that comes together with the answer: here, when Redis is
            # refused just now.
            campaign.cancel()
            await asyncio.wait({campaign}, timeout=0.1)
        if self._term is not None:
            term, self._term = self._term, None
            await term.end(release=True)
        await self._client.aclose()

    async def ping(self) -> None:
        """See the port."""
        self._leading()

    def _leading(self) -> Term:
        if self._term is None:
            raise self._why_not
        return self._term

    # --- who leads -----------------------------------------------------------------------------------------------
    async def _campaign_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / _LOOKS)
            try:
                await self._look()
            except StoreUnavailable as error:
                if self._term is None and str(error) != str(self._why_not):
                    logger.warning("The store cannot be used, trying again: %s", error)
                    self._why_not = error
            except Exception:
                logger.exception("Looking for a leader failed, trying again")

    async def _look(self) -> None:
        """Show that this replica leads, or look whether it should. Raises :class:`StoreUnavailable`."""
        if self._term is not None:
            await self._term.beat()
            return
        lock = await self._records.read_lock()
        if lock.owner not in ("", self._replica):
            now = time.monotonic()
            if (lock.token, lock.beat) != self._seen:
                self._seen, self._seen_at = (lock.token, lock.beat), now
            if now - self._seen_at < self._ttl_s:
                self._why_not = StoreUnavailable("another replica leads")
                return
        await self._take_over(lock)

    async def _take_over(self, lock: Lock) -> None:
        token = f"{int(lock.token.partition('.')[0] or 0) + 1}.{secrets.token_hex(8)}"
        try:
            taken: list[Change] = [(LOCK, "token", token), (LOCK, "owner", self._replica), (LOCK, "beat", "0")]
            await self._records.write(lock.token, taken, beat=lock.beat)
            # From here on nobody else can write: what is read now is all there is.
            reading = asyncio.create_task(self._begin_term(token))
            try:
                beats = 0
                while not (await asyncio.wait({reading}, timeout=self._ttl_s / _LOOKS))[0]:
                    beats -= 1  # the term itself counts upwards
                    await self._records.write(token, [(LOCK, "beat", str(beats))])
                self._term = reading.result()
            finally:
                reading.cancel()
        except Fenced:
            self._why_not = StoreUnavailable("another replica leads")

    async def _begin_term(self, token: str) -> Term:
        lock = await self._records.read_lock()
        if lock.state:
            try:
                return await self._read_fleet(token, lock)
            except ValueError as error:
                # Of another version, or damaged. What cannot be read may have been a lease: hold the seeds back.
                logger.error("The fleet in Redis cannot be read, starting without state: %s", error)
        journal = Journal()
        memory = MemoryStore(self.rules, self._clock, journal)
        books = memory.begin()
        changes: list[Change] = [(kind, "", "") for kind in journal.books]
        changes += [
            (LOCK, "state", books.state_id),
            (LOCK, "born", repr(books.born_at)),
            (LOCK, "now", repr(books.now)),
        ]
        await self._records.write(token, changes)
        logger.info("This replica leads, without an earlier state")
        return self._new_term(memory, journal, token, self._clock)

    async def _read_fleet(self, token: str, lock: Lock) -> Term:
        """The term that continues what an earlier leader wrote. Raises ValueError: it cannot be read."""
        clock = _continued(self._clock, float(lock.now))
        journal = Journal()
        memory = MemoryStore(self.rules, clock, journal)
        memory.resume(lock.state, float(lock.born))
        refused: list[Place] = []
        for kind, book in journal.books.items():
            names: dict[str, bytes] = {}
            async for some in self._records.read(kind):
                names.update(some)
                if not book.in_order:
                    refused += _put_back(memory, book, names)
                    names = {}
            refused += _put_back(memory, book, dict(sorted(names.items(), key=lambda each: int(each[0]))))
        journal.changed.clear()
        if refused:
            logger.warning("%d records were forgotten, because a limit of this planner is lower", len(refused))
            journal.changed.update(dict.fromkeys(refused))
        counts = ", ".join(f"{kind}={len(book)}" for kind, book in journal.books.items())
        logger.info("This replica leads, and read the fleet: %s", counts)
        return self._new_term(memory, journal, token, clock)

    def _new_term(self, memory: MemoryStore, journal: Journal, token: str, clock: Callable[[], float]) -> Term:
        memory.lease_ids = self.lease_ids
        return Term(memory, journal, self._records, token, clock=clock, listener=self, ended=self._term_ended)

    def _term_ended(self, reason: StoreUnavailable) -> None:
        """Forget the fleet: another replica may have changed it. Those who wait here are sent away."""
        logger.warning("This replica no longer leads: %s", reason)
        self._term, self._why_not = None, reason
        self.notify_all()
        self.lost()

    # --- decisions -----------------------------------------------------------------------------------------------
    async def announce(self, announcement: Announcement) -> str:
        """See the port."""
        term = self._leading()
        return await term.decide(term.memory.announce(announcement))

    async def withdraw(self, key: str, seed: SeedAddress) -> None:
        """See the port."""
        term = self._leading()
        await term.decide(term.memory.withdraw(key, seed))

    async def attend(self, announcement: Announcement, *, held: bool) -> int:
        """See the port."""
        term = self._leading()
        return await term.decide(term.memory.attend(announcement, held=held))

    async def leave(self, seed: SeedAddress, number: int, *, answered: bool) -> None:
        """See the port."""
        term = self._leading()
        await term.decide(term.memory.leave(seed, number, answered=answered))

    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """See the port."""
        term = self._leading()
        return await self._granted(term, await term.memory.acquire(ask))

    async def settle(self, ticket: str, *, leave: bool, loads: bool = True) -> Granted | Missed | Queued | None:
        """See the port."""
        term = self._leading()
        return await self._granted(term, await term.memory.settle(ticket, leave=leave, loads=loads))

    async def park(self, ticket: str, *, hung_up: bool = False) -> Granted | Missed | Queued | None:
        """See the port."""
        term = self._leading()
        return await term.decide(term.memory.park(ticket, hung_up=hung_up))

    async def _granted(self, term: Term, result: T) -> T:
        """``result``, once it is written. A lease whose receiver hangs up meanwhile is taken back.

        Not one by ticket: its receiver may have asked again already, and is given the same lease.
        """
        try:
            await term.written()
        except asyncio.CancelledError:
            if isinstance(result, Granted) and not result.by_ticket:
                taking_back = asyncio.get_running_loop().create_task(_take_back(term, result))
                self._cleanups.add(taking_back)
                taking_back.add_done_callback(self._cleanups.discard)
            raise
        return result

    async def release(self, seed: SeedAddress, user_id: str, outcome: Outcome | None) -> Released:
        """See the port."""
        term = self._leading()
        return await term.decide(term.memory.release(seed, user_id, outcome))

    async def renew(self, seed: SeedAddress, user_id: str) -> None:
        """See the port."""
        term = self._leading()
        await term.decide(term.memory.renew(seed, user_id))

    async def intend(self, key: str, intent: str, fingerprint: str, ttl_s: float) -> None:
        """See the port."""
        term = self._leading()
        await term.decide(term.memory.intend(key, intent, fingerprint, ttl_s))

    async def sweep(self) -> float:
        """See the port."""
        if self._term is None:
            return float("inf")
        return await self._term.decide(self._term.memory.sweep())

    # --- for people ----------------------------------------------------------------------------------------------
    async def totals(self) -> dict[str, Totals]:
        """See the port."""
        return await self._leading().memory.totals()

    async def snapshot_slices(
        self, *, key: str | None = None, limit: int = 1000
    ) -> AsyncIterator[tuple[str, str | float | list[Any] | dict[str, Any]]]:
        """See the port."""
        async for part in self._leading().memory.snapshot_slices(key=key, limit=limit):
            yield part

    async def overview(self, *, key: str | None = None, limit: int = 100) -> dict[str, Any]:
        """See the port."""
        return await self._leading().memory.overview(key=key, limit=limit)


async def _take_back(term: Term, lease: Granted) -> None:
    try:
        await term.decide(term.memory.release(lease.seed, lease.user_id, None))
    except (UnknownLease, StoreUnavailable) as error:
        logger.debug("The lease of a receiver that went away is gone already: %s", error)


def _put_back(memory: MemoryStore, book: Book[Any], texts: Mapping[str, bytes]) -> list[Place]:
    """Give ``texts`` by name to ``memory``; the places of those for which a limit leaves no room. Raises ValueError."""
    refused: list[Place] = []
    for name, text in texts.items():
        if name in book:
            continue  # Redis may name a record twice
        try:
            memory.put_back(name, decode(text, book.record_type))
        except LimitReached:
            refused.append((book.kind, name))
    return refused


def _continued(clock: Callable[[], float], now: float) -> Callable[[], float]:
    """``clock``, moved so that it is ``now`` at present."""
    offset_s = now - clock()
    return lambda: clock() + offset_s
