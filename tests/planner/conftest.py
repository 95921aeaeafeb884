"""Stores to test: both kinds, on one clock that only the test moves."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from tests.planner.redis_server import RedisServer
from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.policy import policy_named
from vllm_rfork.planner.store.base import (
    Announcement,
    Ask,
    Event,
    Granted,
    Missed,
    Outcome,
    Queued,
    Rules,
    Store,
)
from vllm_rfork.planner.store.memory import MemoryStore

_fleets = itertools.count()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


async def snapshot(store: Store, **options: Any) -> dict[str, Any]:
    """The whole snapshot of ``store``."""
    whole: dict[str, Any] = {}
    async for name, value in store.snapshot_slices(**options):
        if isinstance(value, dict):
            whole.setdefault(name, {}).update(value)
        elif isinstance(value, list):
            whole.setdefault(name, []).extend(value)
        else:
            whole[name] = value
    return whole


class Fleet:
    """A store under test, with short words for what the tests do to it."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.events: list[Event] = []
        self.settled: list[str] = []
        self._tickets = itertools.count()
        store.observe = self.events.append
        store.notify = self.settled.append

    def kinds(self) -> list[str]:
        return [each.kind for each in self.events]

    async def announce(self, name: int | SeedAddress, key: str = "k", **more: Any) -> str:
        return (await self.store.announce(Announcement(key=key, seed=seed(name), **more)))[0]

    async def ask(self, key: str = "k", **more: Any) -> Granted | Missed | Queued:
        more.setdefault("receiver", "receiver")
        if more.get("wait_s"):
            more.setdefault("ticket", f"ticket{next(self._tickets)}")
        return await self.store.acquire(Ask(key=key, **more))

    async def lease(self, key: str = "k", **more: Any) -> Granted:
        granted = await self.ask(key, **more)
        assert isinstance(granted, Granted), granted
        return granted

    async def release(self, lease: Granted, outcome: Outcome | None = None) -> float:
        return (await self.store.release(lease.seed, lease.user_id, outcome)).held_s

    async def fail(self, lease: Granted, cause: str = "EngineError") -> None:
        await self.release(lease, Outcome(False, cause=cause))

    async def seed_entry(self, name: int) -> dict[str, Any]:
        seeds = (await snapshot(self.store))["seeds"]
        return next(each for each in seeds if each["seed"] == str(seed(name)))


def seed(name: int | SeedAddress) -> SeedAddress:
    return name if isinstance(name, SeedAddress) else SeedAddress(f"10.0.{name // 250}.{name % 250 + 1}", 5000, 0)


MakeFleet = Callable[..., Awaitable[Fleet]]


@pytest_asyncio.fixture(params=["memory", "redis"])
async def make_fleet(request: pytest.FixtureRequest) -> AsyncIterator[MakeFleet]:
    """A function that makes a store of the parameter's kind; ``like`` gives a second one of the same fleet."""
    stores: list[Store] = []

    async def make(policy: str = "least-loaded", like: Fleet | None = None, **rules: Any) -> Fleet:
        settled = replace(Rules(policy=policy_named(policy)), **rules)
        clock = like.clock if like else Clock()
        store: Store
        if request.param == "memory":
            store = MemoryStore(settled, clock)
        else:
            from vllm_rfork.planner.store.redis import RedisStore

            url = request.getfixturevalue("redis_server").url
            prefix = f"fleet{next(_fleets)}"
            store = RedisStore(settled, url, prefix=prefix, clock=clock)
        stores.append(store)
        fleet = Fleet(store, clock)
        await store.open()
        return fleet

    yield make
    for store in stores:
        await store.close()


@pytest_asyncio.fixture
async def fleet(make_fleet: MakeFleet) -> Fleet:
    return await make_fleet()
