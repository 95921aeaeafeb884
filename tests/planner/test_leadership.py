"""Replicas that fail under load: no slot is granted twice, no lease is lost, and waiting receivers keep waiting.

Planners and Redis are real processes; each planner reaches Redis through a proxy of its own. The bounds on time allow
for what this machine kept the test itself waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.planner.processes import PlannerUnderTest, call
from tests.planner.redis_server import RedisServer
from tests.planner.replicas import ADD, Fleet, Proxy, Stalls, fleet_at, leader_of
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.leadership import _LOOKS

LEASE_TTL_S = 10.0
#: A new leader must be there within this time.
NEW_LEADER_S = 5.0
_numbers = itertools.count()


class Replicas:
    """Planner processes of one fleet, with the Redis and the proxies between them."""

    def __init__(self, redis: RedisServer) -> None:
        self.redis = redis
        self.prefix = f"leadership{next(_numbers)}"
        self.planners: list[PlannerUnderTest] = []
        self.proxies: dict[PlannerUnderTest, Proxy] = {}
        self._everything: list[PlannerUnderTest] = []

    async def start(self, count: int) -> None:
        self.planners = list(await asyncio.gather(*(self._start(0) for _ in range(count))))

    async def _start(self, port: int) -> PlannerUnderTest:
        proxy = await Proxy(self.redis.port).start()
        flags = ("--store", f"redis://127.0.0.1:{proxy.port}/0", "--redis-prefix", self.prefix, "--slots", "1")
        flags += ("--lease-ttl-sec", str(LEASE_TTL_S), "--sweep-every-sec", "0.5", "--leader-ttl-sec", "1")
        planner = PlannerUnderTest(*flags, port=port)
        self._everything.append(planner)
        self.proxies[planner] = proxy
        await asyncio.to_thread(planner.until_ready)
        return planner

    @property
    def urls(self) -> list[str]:
        return [each.url for each in self.planners]

    async def restart(self, planner: PlannerUnderTest) -> None:
        self.planners[self.planners.index(planner)] = await self._start(planner.port)

    async def stop(self) -> None:
        for each in self._everything:
            each.process.send_signal(signal.SIGCONT)
            each.kill()
        for proxy in self.proxies.values():
            await proxy.stop()


@pytest_asyncio.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[Callable[[], Replicas]]:
    redis = RedisServer(tmp_path, keeps_data=True)
    redis.start()
    made: list[Replicas] = []

    def make() -> Replicas:
        made.append(Replicas(redis))
        return made[-1]

    yield make
    for each in made:
        await each.stop()
    redis.kill()


@contextlib.asynccontextmanager
async def new_leader(fleet: Fleet, others: list[PlannerUnderTest]) -> AsyncIterator[None]:
    """Within the block the leader fails; one of ``others`` must lead soon after."""
    async with Stalls() as stalls:
        yield
        failed_at = time.monotonic()
        await leader_of(fleet.session, others)
        took_s = time.monotonic() - failed_at
    assert took_s < NEW_LEADER_S + 3 * stalls.stalled_s, f"{took_s:.1f} s, of which stalled {stalls.stalled_s:.1f} s"


# --- faults: each makes the leader fail while the fleet forks, and mends it again -------------------------------------


async def killed(replicas: Replicas, leader: PlannerUnderTest, fleet: Fleet) -> None:
    others = [each for each in replicas.planners if each is not leader]
    async with new_leader(fleet, others):
        leader.kill()
    await fleet.forks(10)
    await replicas.restart(leader)


async def stopped(replicas: Replicas, leader: PlannerUnderTest, fleet: Fleet) -> None:
    """SIGSTOP: the leader wakes up after it lost its lock, with calls that it has not seen yet.

    It wakes up early, while its last write may still be answered: only the token tells that it does not lead any more.
    """
    others = [each for each in replicas.planners if each is not leader]
    async with new_leader(fleet, others):
        leader.process.send_signal(signal.SIGSTOP)
    asked = [asyncio.create_task(call(fleet.session, "GET", leader.url + "/get_seed", SEED_KEY="k")) for _ in range(20)]
    asked += [
        asyncio.create_task(call(fleet.session, "POST", leader.url + "/add_seed", SEED_KEY="k", SEED_PORT="7", **ADD))
    ]
    await asyncio.sleep(0.2)
    leader.process.send_signal(signal.SIGCONT)
    answers = {status for status, _ in await asyncio.wait_for(asyncio.gather(*asked), 60)}
    assert answers <= {503, 0}, "a leader that lost its lock decided something"


async def cut_off(replicas: Replicas, leader: PlannerUnderTest, fleet: Fleet) -> None:
    """Connections between the leader and Redis break."""
    await _without_redis(replicas, leader, fleet, replicas.proxies[leader].refusing())


async def silently_cut_off(replicas: Replicas, leader: PlannerUnderTest, fleet: Fleet) -> None:
    """Packets between the leader and Redis are delayed until another replica leads, and arrive then."""
    await _without_redis(replicas, leader, fleet, replicas.proxies[leader].silent())


async def _without_redis(
    replicas: Replicas, leader: PlannerUnderTest, fleet: Fleet, cut: contextlib.AbstractContextManager[None]
) -> None:
    with cut:
        async with new_leader(fleet, [each for each in replicas.planners if each is not leader]):
            pass
        await fleet.forks(10)


async def redis_restarted(replicas: Replicas, leader: PlannerUnderTest, fleet: Fleet) -> None:
    replicas.redis.kill()
    await asyncio.sleep(1.5)  # longer than a leader may be silent
    async with new_leader(fleet, replicas.planners):
        await asyncio.to_thread(replicas.redis.start)


async def redis_slow(replicas: Replicas, leader: PlannerUnderTest, fleet: Fleet) -> None:
    """Redis answers after 0.6 s, then after 1.6 s, which is longer than a leader may be silent, then quickly again."""
    for delay_s in (0.3, 0.8):
        with contextlib.ExitStack() as slow:
            for each in replicas.planners:
                slow.enter_context(replicas.proxies[each].slow(delay_s))
            await asyncio.sleep(4)


FAULTS = [killed, stopped, cut_off, silently_cut_off, redis_restarted, redis_slow]


async def fail(replicas: Replicas, count: int, faults: list[Callable[..., object]]) -> None:
    await replicas.start(count)
    async with fleet_at(replicas.urls, LEASE_TTL_S) as fleet:
        await fleet.forks(20)
        for fault in faults:
            leader = await leader_of(fleet.session, replicas.planners)
            await fault(replicas, leader, fleet)  # type: ignore[misc]
            await fleet.forks(20)
    await nothing_leaked(replicas)


async def nothing_leaked(replicas: Replicas) -> None:
    """Once everything has expired, every slot is free again."""
    deadline = time.monotonic() + 60
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        while True:
            leader = await leader_of(session, replicas.planners)
            async with session.get(leader.url + "/debug/snapshot") as answer:
                snapshot = await answer.json() if answer.status == 200 else {"leases": 1}
            if not snapshot["leases"] and not snapshot["waiting"]:
                return
            assert time.monotonic() < deadline, snapshot
            await asyncio.sleep(0.1)


@pytest.mark.parametrize(
    "fault", [killed, *(pytest.param(fault, marks=pytest.mark.long) for fault in (stopped, silently_cut_off))]
)
async def test_of_two_replicas_the_other_leads(replicas: Callable[[], Replicas], fault: Callable[..., object]) -> None:
    await fail(replicas(), 2, [fault])


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
async def test_every_fault_twice_under_load(replicas: Callable[[], Replicas], count: int) -> None:
    await fail(replicas(), count, [*FAULTS, *reversed(FAULTS)])


def test_the_default_takeover_is_within_the_bound() -> None:
    """A silent leader is noticed one look after its TTL, and each look may begin one interval late."""
    ttl_s = Settings.model_fields["leader_ttl_sec"].default
    assert ttl_s * (1 + 2 / _LOOKS) < NEW_LEADER_S
