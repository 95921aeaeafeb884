"""What only the Redis store has to survive: dead replicas, forgotten scripts, broken subscriptions."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest_asyncio
import redis.asyncio

from tests.planner.conftest import Clock, Fleet, seed
from tests.planner.redis_server import RedisServer
from vllm_rfork.planner.policy import policy_named
from vllm_rfork.planner.redis_store import RedisStore
from vllm_rfork.planner.store import Ask, Granted, LimitReached, Missed, Queued, Rules
from vllm_rfork.planner.waiting import WaitingRoom

_numbers = itertools.count()
Replica = Callable[[], Awaitable[Fleet]]


@pytest_asyncio.fixture
async def replica(redis_server: RedisServer) -> AsyncIterator[Replica]:
    """Opens another replica of one fleet; all share a clock."""
    clock, prefix, stores = Clock(), f"replicas{next(_numbers)}", []

    async def make() -> Fleet:
        stores.append(
            RedisStore(Rules(policy=policy_named("least-loaded")), redis_server.url, prefix=prefix, clock=clock)
        )
        fleet = Fleet(stores[-1], clock)
        await stores[-1].open()
        return fleet

    yield make
    for each in stores:
        await each.close()


async def settle(fleet: Fleet, queued: object) -> object:
    assert isinstance(queued, Queued)
    return await fleet.store.settle(queued.ticket, leave=False)


async def test_who_waits_at_a_dead_replica_is_passed_over(replica: Replica) -> None:
    dead, alive = await replica(), await replica()
    for _ in range(20):
        await dead.ask(wait_s=500, ticket=f"dead{next(_numbers)}")
    waiting = await alive.ask(wait_s=500, ticket="alive")
    for _ in range(4):
        alive.clock.pass_(5)
        await alive.store.sweep()
    await alive.announce(1)
    granted = await settle(alive, waiting)
    assert isinstance(granted, Granted), "a slot was kept for a receiver that nobody will tell"
    assert (await alive.store.totals())["k"].waiting == 0


async def test_nobody_waits_for_the_intent_of_one_at_a_dead_replica(replica: Replica) -> None:
    dead, alive = await replica(), await replica()
    await alive.store.intend("k", "loading", "", 600)
    await dead.ask(wait_s=500, ticket="dead", intent="dead")
    waiting = await alive.ask(wait_s=500, ticket="alive", intent="alive")
    for _ in range(4):
        alive.clock.pass_(5)
        await alive.store.sweep()
    await alive.store.intend("k", "loading", "", 0)
    assert await settle(alive, waiting) == Missed(intent=True)


async def test_replicas_share_seeds_leases_and_limits(replica: Replica) -> None:
    one, other = await replica(), await replica()
    await one.announce(1)
    lease = await other.lease()
    await one.store.renew(lease.seed, lease.user_id)
    assert not isinstance(await one.ask(), Granted)
    await one.release(lease)
    assert (await other.lease()).seed == seed(1)
    assert one.store.rules == other.store.rules


async def test_a_redis_that_forgot_the_script_is_told_again(replica: Replica, redis_server: RedisServer) -> None:
    fleet = await replica()
    await fleet.announce(1)
    client = redis.asyncio.Redis.from_url(redis_server.url)
    await client.script_flush()
    await client.aclose()
    leases = await asyncio.gather(*(fleet.ask() for _ in range(10)))
    assert sum(isinstance(each, Granted) for each in leases) == 1


async def test_a_broken_subscription_loses_no_notification(replica: Replica, redis_server: RedisServer) -> None:
    fleet = await replica()
    room = WaitingRoom(fleet.store)
    waiting = asyncio.create_task(room.acquire(Ask(key="k", receiver="r", wait_s=60)))
    while not (await fleet.store.totals()).get("k"):
        await asyncio.sleep(0.01)
    client = redis.asyncio.Redis.from_url(redis_server.url)
    await client.client_kill_filter(_type="pubsub")
    await fleet.announce(1)  # its message finds nobody subscribed, or arrives after all
    granted = await asyncio.wait_for(waiting, 20)
    await client.aclose()
    assert isinstance(granted, Granted)
    assert granted.seed == seed(1)


async def test_decisions_of_many_callers_are_answered_each_with_its_own(replica: Replica) -> None:
    fleet = await replica()
    await asyncio.gather(*(fleet.announce(number, key=f"key{number}") for number in range(200)))
    leases = await asyncio.gather(*(fleet.lease(f"key{number}") for number in range(200)))
    assert [each.seed for each in leases] == [seed(number) for number in range(200)]


async def test_probes_do_not_take_the_connections_of_decisions(replica: Replica, redis_server: RedisServer) -> None:
    store = (await replica()).store
    async with redis.asyncio.Redis.from_url(redis_server.url, protocol=2) as client:
        await client.ping()
        before = (await client.info("clients"))["connected_clients"]
        await asyncio.gather(*(store.ping() for _ in range(300)))
        assert (await client.info("clients"))["connected_clients"] <= before + 1


async def test_a_declined_decision_does_not_spoil_the_others(redis_server: RedisServer) -> None:
    rules = Rules(policy=policy_named("least-loaded"), max_seeds=1)
    fleet = Fleet(RedisStore(rules, redis_server.url, prefix="declined", clock=Clock()), Clock())
    await fleet.store.open()
    done = await asyncio.gather(*(fleet.announce(number) for number in range(5)), return_exceptions=True)
    assert [isinstance(each, LimitReached) for each in done] == [False, True, True, True, True]
    await fleet.store.close()
