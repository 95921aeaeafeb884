"""A store whose calls are measured, in front of one that decides."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol, TypeVar

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
    Store,
    Totals,
)
from vllm_rfork.planner.store.errors import StoreUnavailable
from vllm_rfork.planner.store.key_use import UNNAMED, KeyNames

T = TypeVar("T")


class Meter(Protocol):
    """Counts the calls of a store."""

    def measured(self, operation: str, duration_s: float) -> None:
        """Note that a call of the port's method ``operation`` took ``duration_s``, whatever its result."""

    def unavailable(self, reason: str) -> None:
        """Note that a call raised :class:`StoreUnavailable` for this reason."""


class TimedStore(Store):
    """Passes every call on to ``store`` and measures it.

    The owner sets the callbacks here: :meth:`open` passes them on.
    """

    def __init__(self, store: Store, meter: Meter) -> None:
        super().__init__(store.rules)
        self._store = store
        self._meter = meter

    async def _measure(self, operation: str, call: Awaitable[T]) -> T:
        started_at = time.perf_counter()
        try:
            return await call
        except StoreUnavailable as error:
            self._meter.unavailable(error.reason)
            raise
        finally:
            self._meter.measured(operation, time.perf_counter() - started_at)

    async def open(self) -> None:
        """See the port."""
        inner = self._store
        inner.notify, inner.notify_all = self.notify, self.notify_all
        inner.lost, inner.observe, inner.lease_ids = self.lost, self.observe, self.lease_ids
        await self._measure("open", inner.open())

    async def close(self) -> None:
        """See the port."""
        await self._store.close()

    async def ping(self) -> None:
        """See the port."""
        await self._measure("ping", self._store.ping())

    # --- decisions -----------------------------------------------------------------------------------------------
    async def announce(self, announcement: Announcement) -> tuple[str, Served]:
        """See the port."""
        return await self._measure("announce", self._store.announce(announcement))

    async def withdraw(self, key: str, seed: SeedAddress) -> None:
        """See the port."""
        await self._measure("withdraw", self._store.withdraw(key, seed))

    async def drain(self, key: str, seed: SeedAddress, *, undo: bool) -> int:
        """See the port."""
        return await self._measure("drain", self._store.drain(key, seed, undo=undo))

    async def lift(self, key: str, seed: SeedAddress) -> bool:
        """See the port."""
        return await self._measure("lift", self._store.lift(key, seed))

    async def find(self, key: str) -> SeedAddress | None:
        """See the port."""
        return await self._measure("find", self._store.find(key))

    async def attend(self, announcement: Announcement, *, held: bool) -> int:
        """See the port."""
        return await self._measure("attend", self._store.attend(announcement, held=held))

    async def leave(self, seed: SeedAddress, number: int, *, answered: bool) -> None:
        """See the port."""
        await self._measure("leave", self._store.leave(seed, number, answered=answered))

    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """See the port."""
        return await self._measure("acquire", self._store.acquire(ask))

    async def settle(self, ticket: str, *, leave: bool, loads: bool = True) -> Granted | Missed | Queued | None:
        """See the port."""
        return await self._measure("settle", self._store.settle(ticket, leave=leave, loads=loads))

    async def park(self, ticket: str, *, hung_up: bool = False) -> Granted | Missed | Queued | None:
        """See the port."""
        return await self._measure("park", self._store.park(ticket, hung_up=hung_up))

    async def renew(self, seed: SeedAddress, user_id: str) -> None:
        """See the port."""
        await self._measure("renew", self._store.renew(seed, user_id))

    async def release(self, seed: SeedAddress, user_id: str, outcome: Outcome | None) -> Released:
        """See the port."""
        return await self._measure("release", self._store.release(seed, user_id, outcome))

    async def intend(
        self, key: str, intent: str, fingerprint: str, ttl_s: float, *, names: KeyNames = UNNAMED, address: str = ""
    ) -> None:
        """See the port."""
        intended = self._store.intend(key, intent, fingerprint, ttl_s, names=names, address=address)
        await self._measure("intend", intended)

    async def sweep(self) -> float:
        """See the port."""
        return await self._measure("sweep", self._store.sweep())

    # --- for people ----------------------------------------------------------------------------------------------
    async def totals(self) -> dict[str, Totals]:
        """See the port."""
        return await self._measure("totals", self._store.totals())

    def names_of(self, key: str) -> KeyNames:
        """See the port. Not measured: it is one look-up."""
        return self._store.names_of(key)

    def snapshot_slices(
        self, *, key: str | None = None, limit: int = 1000
    ) -> AsyncIterator[tuple[str, str | float | list[Any] | dict[str, Any]]]:
        """See the port. Not measured: its time is that of the reader."""
        return self._store.snapshot_slices(key=key, limit=limit)

    async def overview(
        self, *, key: str | None = None, names: KeyNames | None = None, find: str = "", limit: int = 100
    ) -> dict[str, Any]:
        """See the port."""
        shown = self._store.overview(key=key, names=names, find=find, limit=limit)
        return await self._measure("overview", shown)
