"""The start of a term: the fleet is read from Redis, or begins without state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from vllm_rfork.planner.store.base import Rules
from vllm_rfork.planner.store.errors import LimitReached
from vllm_rfork.planner.store.fenced import Change, FencedRecords, Lock, lock_changes
from vllm_rfork.planner.store.journal import Book, Journal, Place, decode
from vllm_rfork.planner.store.memory import MemoryStore

logger = logging.getLogger(__name__)


class Takeover:
    """The fleet of a new leader.

    Attributes:
        clock: the fleet's clock. It continues where the earlier leader's last write left it.
        memory: the fleet, with ``journal`` noting what changes in it.
    """

    def __init__(self, rules: Rules, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.journal = Journal()
        self.memory = MemoryStore(rules, clock, self.journal)


async def take_over(records: FencedRecords, token: str, rules: Rules, clock: Callable[[], float]) -> Takeover:
    """Read the fleet under ``token``, which must be the lock's: nobody else can write any more.

    Args:
        clock: this process's monotonic seconds.

    Raises:
        StoreUnavailable: Redis cannot be reached.
        Fenced: another replica leads.
    """
    lock = await records.read_lock()
    if lock.state:
        try:
            return await _read_fleet(records, rules, clock, lock)
        except ValueError as error:
            # Of another version, or damaged. What cannot be read may have been a lease: hold the seeds back.
            logger.error("The fleet in Redis cannot be read, starting without state: %s", error)
    new = Takeover(rules, clock)
    fleet = new.memory.begin()
    changes: list[Change] = [(kind, "", b"") for kind in new.journal.books]
    changes += lock_changes(state=fleet.state_id, born=repr(fleet.born_at), now=repr(fleet.now))
    await records.write(token, changes)
    logger.info("This replica leads, without an earlier state")
    return new


async def _read_fleet(records: FencedRecords, rules: Rules, clock: Callable[[], float], lock: Lock) -> Takeover:
    """Continue what an earlier leader wrote. Raises ValueError if it cannot be read."""
    began_at: float | None = None

    def fleets_clock() -> float:
        """The fleet's time, which stands still until all is read: nothing expires before somebody could renew it."""
        return float(lock.now) + (0.0 if began_at is None else clock() - began_at)

    new = Takeover(rules, fleets_clock)
    new.memory.resume(lock.state, float(lock.born))
    refused: list[Place] = []
    for kind, book in new.journal.books.items():
        texts: dict[str, bytes] = {}
        async for some in records.read(kind):
            texts.update(some)
            if not book.in_order:
                refused += _restore(new.memory, book, texts)
                texts = {}
        refused += _restore(new.memory, book, dict(sorted(texts.items(), key=lambda each: int(each[0]))))
    began_at = clock()
    new.journal.changed.clear()
    if refused:
        logger.warning("%d records were forgotten, because a limit of this planner is lower", len(refused))
        new.journal.changed.update(dict.fromkeys(refused))
    counts = ", ".join(f"{kind}={len(book)}" for kind, book in new.journal.books.items())
    logger.info("This replica leads and has read the fleet: %s", counts)
    return new


def _restore(memory: MemoryStore, book: Book[Any], texts: Mapping[str, bytes]) -> list[Place]:
    """Give ``texts`` by name to ``memory``; returns the places for which a limit leaves no room. Raises ValueError."""
    refused: list[Place] = []
    for name, text in texts.items():
        if name in book:
            continue  # Redis may return a record twice
        try:
            memory.restore(name, decode(text, book.record_type))
        except LimitReached:
            refused.append((book.kind, name))
    return refused
