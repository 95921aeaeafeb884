"""Workers' clients with the URLs of all replicas, while real replicas over a real Redis die under them."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable, Iterator

import aiohttp
import pytest

from tests.planner.processes import PlannerUnderTest
from tests.planner.redis_server import RedisServer
from tests.planner.replicas import leader_of
from vllm_rfork.clients import LeaseKeeper, Outcome, PlannerClient
from vllm_rfork.errors import PlannerError
from vllm_rfork.messages import Lease, SeedAddress

KEY = "/models/q$prod$kv_both$0$0"
SEED = SeedAddress("127.0.0.1", 5000, 0)
WITHIN_S = 90.0


@pytest.fixture
def replicas(redis_server: RedisServer) -> Iterator[list[PlannerUnderTest]]:
    """Three replicas of one planner; a seed has one slot."""
    flags = ("--store", redis_server.url, "--redis-prefix", "clients", "--leader-ttl-sec", "1", "--slots", "1")
    started = [PlannerUnderTest(*flags) for _ in range(3)]
    try:
        yield [each.until_ready() for each in started]
    finally:
        for each in started:
            each.process.send_signal(signal.SIGCONT)
            each.kill()


class Seat:
    """The only slot of the seed: how many receivers hold it at once, and in what order they did."""

    def __init__(self) -> None:
        self.holders: list[str] = []
        self.most = 0

    def __contains__(self, name: str) -> bool:
        return name in self.holders


async def waits_and_reads(urls: str, name: str, seat: Seat, done: asyncio.Event, waiting: asyncio.Event) -> None:
    """A receiver: waits for a lease, renews it until ``done``, and releases it. Raises what its client raises."""
    client = PlannerClient(urls, request_timeout_s=6.0)
    in_queue = False
    while True:
        answer = await client.ask(KEY, f"ticket-of-{name}", wait_s=WITHIN_S, in_queue=in_queue)
        if isinstance(answer, Lease):
            break
        in_queue = True
        waiting.set()
    keeper = LeaseKeeper(client, answer)
    await keeper.start()
    seat.holders.append(name)
    seat.most = max(seat.most, len(seat.holders))
    await done.wait()
    keeper.check()
    await keeper.stop()
    seat.holders.remove(name)
    assert await client.release(answer, result="ok", nbytes=1, seconds=1.0) is Outcome.DONE


async def announces(urls: str) -> None:
    """A seed that announces itself every half second, whatever happens to the planner."""
    client = PlannerClient(urls, request_timeout_s=6.0)
    while True:
        with contextlib.suppress(PlannerError):
            await client.announce(KEY, SEED, epoch="e1")
        await asyncio.sleep(0.5)


@pytest.mark.parametrize(
    "ends",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.long)],
)
async def test_a_dead_leader_ends_no_wait_and_no_lease_and_nothing_is_granted_twice(
    ends: signal.Signals, replicas: list[PlannerUnderTest]
) -> None:
    urls = ",".join(each.url for each in replicas)
    seat = Seat()
    done = {name: asyncio.Event() for name in "abc"}
    waiting = {name: asyncio.Event() for name in "abc"}
    seed = asyncio.create_task(announces(urls))
    tasks: dict[str, asyncio.Task[None]] = {}

    async def start(name: str) -> None:
        tasks[name] = asyncio.create_task(waits_and_reads(urls, name, seat, done[name], waiting[name]))

    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            leader = await leader_of(session, replicas)
            await until(lambda: seed_is_known(urls))
            await start("a")
            await until(lambda: is_true("a" in seat))
            for name in "bc":
                await start(name)
                await asyncio.wait_for(waiting[name].wait(), WITHIN_S)

            leader.process.send_signal(ends)
            others = [each for each in replicas if each is not leader]
            began = time.monotonic()
            await leader_of(session, others)
            assert time.monotonic() - began < 10
            # Longer than a held call and its share of the timeout: every party has met the new leader.
            await asyncio.sleep(15 if ends is signal.SIGSTOP else 5)
            leader.process.send_signal(signal.SIGCONT)
            assert not [name for name in tasks if tasks[name].done()], "a wait or a lease has ended"
            assert seat.holders == ["a"]

            done["a"].set()
            await until(lambda: is_true(len(seat.holders) == 1 and "a" not in seat))
            for name in "bc":
                done[name].set()
            await asyncio.wait_for(asyncio.gather(*tasks.values()), WITHIN_S)
    finally:
        for task in (seed, *tasks.values()):
            task.cancel()
    assert seat.most == 1


async def seed_is_known(urls: str) -> bool:
    return bool((await PlannerClient(urls).snapshot())["seeds"])


async def is_true(condition: bool) -> bool:
    return condition


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not await condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.05)
