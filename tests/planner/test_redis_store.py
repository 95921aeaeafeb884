"""The Redis store: one replica leads, writes every change before it answers, and loses nothing when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio

from tests.planner.conftest import Clock, Fleet, seed, snapshot
from tests.planner.redis_server import RedisServer
from vllm_rfork.messages import CacheResults
from vllm_rfork.messages.metering import Served
from vllm_rfork.planner.http.presence import Presence
from vllm_rfork.planner.policy import policy_named
from vllm_rfork.planner.store.base import Announcement, Ask, Granted, Missed, Outcome, Queued, Rules
from vllm_rfork.planner.store.errors import LimitReached, StillLeased, StoreUnavailable, UnknownLease
from vllm_rfork.planner.store.fenced import Change, FencedRecords
from vllm_rfork.planner.store.redis import RedisStore
from vllm_rfork.planner.wait_queue import WaitQueue

_numbers = itertools.count()
Replica = Callable[..., Awaitable[Fleet]]


@pytest_asyncio.fixture
async def client(redis_server: RedisServer) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(redis_server.url, protocol=2) as client:
        yield client


@pytest.fixture
def prefix() -> str:
    return f"replicas{next(_numbers)}"


@pytest_asyncio.fixture
async def replica(redis_server: RedisServer, prefix: str) -> AsyncIterator[Replica]:
    """Opens another replica of one fleet; all share a clock.

    A replica waits for a silent leader as long as ``patience_s`` says: by default it leads only if nobody ever did, or
    the leader has let go.
    """
    clock, fleets = Clock(), []

    async def make(patience_s: float = 3600.0, **rules: Any) -> Fleet:
        rules.setdefault("policy", policy_named("least-loaded"))
        store = RedisStore(Rules(**rules), redis_server.url, prefix=prefix, leader_ttl_s=patience_s, clock=clock)
        fleet = Fleet(store, clock)
        fleets.append(fleet)
        await store.open()
        return fleet

    yield make
    for each in fleets:
        await each.store.close()


def redis_store(fleet: Fleet) -> RedisStore:
    assert isinstance(fleet.store, RedisStore)
    return fleet.store


async def freeze(fleet: Fleet) -> None:
    """As a process that the system has stopped: it shows no sign of life, and does not look around either."""
    await redis_store(fleet).leadership.stop_looking()


async def until_leading(fleet: Fleet) -> Fleet:
    async def leads() -> None:
        while not redis_store(fleet).leads:
            await asyncio.sleep(0.01)

    await asyncio.wait_for(leads(), 30)
    return fleet


async def successor_of(fleet: Fleet, replica: Replica, **rules: Any) -> Fleet:
    """Another replica, after the leading one was killed."""
    await freeze(fleet)
    return await until_leading(await replica(patience_s=0.05, **rules))


async def settle(fleet: Fleet, queued: object) -> object:
    assert isinstance(queued, Queued)
    return await fleet.store.settle(queued.ticket, leave=False)


# --- who leads -------------------------------------------------------------------------------------------------------


async def test_one_replica_leads_and_the_others_decide_nothing(replica: Replica) -> None:
    leader, standby = await replica(), await replica()
    await leader.announce(1)
    lease = await leader.lease()
    await standby.store.sweep()
    for refused in (
        standby.announce(2),
        standby.ask(),
        standby.ask(wait_s=10),
        standby.release(lease),
        standby.store.renew(lease.seed, lease.user_id),
        standby.store.settle("ticket", leave=True),
        standby.store.withdraw("k", seed(1)),
        standby.store.intend("k", "i", "", 10),
        standby.store.totals(),
        snapshot(standby.store),
        standby.store.overview(),
        standby.store.ping(),
    ):
        with pytest.raises(StoreUnavailable, match="another replica leads"):
            await refused
    assert standby.events == []
    await leader.release(lease)


async def test_every_caller_gets_an_error_of_its_own(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is raised for all callers of an outage keeps the frames, and so the requests, of all of them."""
    leader = await replica()

    async def write(token: str, changes: list[Change]) -> None:
        raise StoreUnavailable("Redis is gone")

    monkeypatch.setattr(redis_store(leader).records, "write", write)
    raised = await asyncio.gather(*(leader.announce(number) for number in range(3)), return_exceptions=True)
    raised += await asyncio.gather(*(leader.store.totals() for _ in range(3)), return_exceptions=True)
    assert [str(error) for error in raised] == ["Redis is gone"] * 6
    assert len({id(error) for error in raised}) == 6


async def test_of_many_that_find_no_leader_exactly_one_leads(replica: Replica) -> None:
    fleets = await asyncio.gather(*(replica() for _ in range(8)))
    assert sum(redis_store(each).leads for each in fleets) == 1


async def test_a_leader_that_closes_lets_another_one_lead(replica: Replica) -> None:
    leader = await replica()
    state = await leader.announce(1)
    lease = await leader.lease()
    standby = await replica(patience_s=6)  # looks each second
    await leader.store.close()
    await until_leading(standby)
    assert await standby.ask() == Missed()
    await standby.release(lease)
    assert (await standby.lease()).seed == seed(1)
    assert await standby.announce(1) == state, "the state is the same"


async def test_a_silent_leader_is_replaced_and_a_living_one_is_not(replica: Replica) -> None:
    leader = await replica(patience_s=0.6)  # beats ten times a second
    standby = await replica(patience_s=3.0)
    for _ in range(5):
        before = redis_store(standby).leadership.seen
        while redis_store(standby).leadership.seen == before:
            await asyncio.sleep(0.01)
        assert redis_store(leader).leads, "the standby has seen it live"
    await freeze(leader)
    await until_leading(standby)


async def test_what_a_deposed_leader_decides_is_rejected_and_forgotten(replica: Replica) -> None:
    old = await replica()
    await old.announce(1)
    await old.announce(2)
    lease = await old.lease()
    waiting = asyncio.create_task(WaitQueue(old.store).acquire(Ask(key="none", receiver="r", wait_s=3600)))
    while not (await old.store.totals()).get("none"):
        await asyncio.sleep(0.01)
    new = await successor_of(old, replica)
    assert redis_store(old).leads, "it has not noticed yet"
    with pytest.raises(StoreUnavailable):
        await old.lease()
    assert not redis_store(old).leads
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(waiting, 30)  # whoever waits there is sent away
    assert isinstance(await new.ask(), Granted)
    assert await new.ask() == Missed()
    assert {each["seed"] for each in (await snapshot(new.store))["leases"]} == {str(seed(1)), str(seed(2))}
    await new.store.renew(lease.seed, lease.user_id)


@pytest.mark.parametrize("what", ["renewal", "heartbeat", "miss"])
async def test_a_deposed_leader_confirms_nothing_even_if_nothing_changes(replica: Replica, what: str) -> None:
    old = await replica()
    await old.announce(1)
    lease = await old.lease()
    await successor_of(old, replica)
    call = {"renewal": old.store.renew(lease.seed, lease.user_id), "heartbeat": old.announce(1), "miss": old.ask()}
    with pytest.raises(StoreUnavailable):
        await call.pop(what)
    for unused in call.values():
        unused.close()


async def test_a_replica_closes_even_if_redis_refuses_at_that_moment(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    await replica()
    store = redis_store(await replica(patience_s=0.6))
    answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    asked = asyncio.Event()

    async def read_lock() -> object:
        asked.set()
        return await store.records._ask(answer)

    monkeypatch.setattr(store.records, "read_lock", read_lock)
    await asyncio.wait_for(asked.wait(), 30)
    await asyncio.sleep(0)
    answer.set_exception(ConnectionError())
    await asyncio.wait_for(store.close(), 30)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_lease_by_ticket_outlives_the_question_that_broke_off(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    fleet = await replica()
    question = Ask(key="k", receiver="r", ticket="t", keeps=True, patient=True)
    await fleet.announce(1, slots=1)
    if waits:
        held = await fleet.lease()
        assert isinstance(await fleet.store.acquire(question), Queued)
        assert isinstance(await fleet.store.acquire(question), Queued)
        await fleet.release(held)
    write, blocked, goes_on = FencedRecords.write, asyncio.Event(), asyncio.Event()

    async def slowly(self: FencedRecords, *arguments: Any, **more: Any) -> None:
        blocked.set()
        await goes_on.wait()
        await write(self, *arguments, **more)

    monkeypatch.setattr(FencedRecords, "write", slowly)
    broken = asyncio.create_task(fleet.store.settle("t", leave=False) if waits else fleet.store.acquire(question))
    await asyncio.wait_for(blocked.wait(), 30)
    again = asyncio.create_task(fleet.store.acquire(question))
    await asyncio.sleep(0)
    broken.cancel()
    await asyncio.wait({broken})
    await asyncio.sleep(0)
    goes_on.set()
    lease = await asyncio.wait_for(again, 30)
    assert isinstance(lease, Granted)
    await fleet.store.renew(lease.seed, lease.user_id)


async def test_a_drain_outlives_the_leader_that_received_it(replica: Replica) -> None:
    leader = await replica()
    for name in (1, 2, 3):
        await leader.announce(name, epoch="e")
        await leader.store.drain("k", seed(name), undo=False)
    await leader.store.drain("k", seed(2), undo=True)
    await leader.store.withdraw("k", seed(3))
    successor = await successor_of(leader, replica)
    assert (await successor.lease()).seed == seed(2)
    assert (await successor.seed_entry(1))["drained"]
    await successor.announce(3, epoch="e")
    assert (await successor.seed_entry(3))["drained"], "the order was for a seed that was away"


async def test_a_drain_outlives_a_leader_of_a_version_without_drains(replica: Replica) -> None:
    """Such a leader grants the seed, and writes it without its drain."""
    leader = await replica()
    for name in (1, 2):
        await leader.announce(name, epoch="e")
    await leader.store.drain("k", seed(1), undo=False)
    term = redis_store(leader).leadership.leading()
    term.memory._fleet.seeds[str(seed(1))].drained = False
    await leader.announce(2, epoch="e")
    successor = await successor_of(leader, replica)
    assert (await successor.seed_entry(1))["drained"]
    assert (await successor.lease()).seed == seed(2)
    assert isinstance(await successor.ask(), Missed)


# --- what a successor finds ------------------------------------------------------------------------------------------


async def test_a_successor_gives_every_lease_and_every_seed_its_full_time(replica: Replica) -> None:
    leader = await replica()
    await leader.announce(1)
    lease = await leader.lease()
    await leader.store.intend("k", "loads", "", 60)
    leader.clock.pass_(50)
    await redis_store(leader).leadership.look()  # a sign of life, which also writes the fleet's clock
    new = await successor_of(leader, replica)
    new.clock.pass_(59)
    await new.store.sweep()
    assert await new.ask() == Missed(), "the lease may still be read under"
    assert (await new.store.totals())["k"].intents == 1
    new.clock.pass_(1)
    await new.store.sweep()
    assert sorted(new.kinds()) == ["intent_expired", "lease_expired", "seed_dropped"]
    with pytest.raises(UnknownLease):
        await new.store.renew(lease.seed, lease.user_id)


async def test_what_ages_goes_on_ageing_and_stands_still_while_nobody_leads(replica: Replica) -> None:
    leader = await replica(failures=1, backoff_s=100.0)
    await leader.announce(1)
    await leader.announce(2)
    for _ in range(2):
        await leader.fail(await leader.lease())
    leader.clock.pass_(40)
    await leader.announce(1)
    await leader.announce(2)
    await leader.announce(3, key="other")
    leader.clock.pass_(1000)  # nobody has written that these passed
    new = await successor_of(leader, replica, failures=1, backoff_s=100.0)
    assert (await new.seed_entry(1))["aside_s"] == 60
    assert [each["ago_s"] for each in (await snapshot(new.store))["history"]] == [40, 40]
    assert await new.ask() == Missed()
    new.clock.pass_(59)
    await new.announce(1)
    assert await new.ask() == Missed()
    new.clock.pass_(1)
    await new.lease()


async def test_a_draining_seed_drains_on(replica: Replica) -> None:
    leader = await replica()
    await leader.announce(1, slots=2)
    lease = await leader.lease()
    with pytest.raises(StillLeased):
        await leader.store.withdraw("k", seed(1))
    new = await successor_of(leader, replica)
    assert await new.ask() == Missed()
    await new.release(lease)
    assert await new.store.totals() == {}


async def test_a_lease_that_was_never_fetched_blocks_its_slot_only_shortly(replica: Replica) -> None:
    leader = await replica()
    await leader.ask(wait_s=100)
    await leader.announce(1)
    new = await successor_of(leader, replica)
    assert await new.ask() == Missed()
    new.clock.pass_(5)
    await new.lease()


async def test_history_is_in_order_and_bounded_through_several_leaders(replica: Replica) -> None:
    fleet = await replica(max_history=4)
    await fleet.announce(1)
    for leader in range(3):
        for number in range(3):
            await fleet.release(await fleet.lease(), Outcome(True, nbytes=10 * leader + number))
        fleet = await successor_of(fleet, replica, max_history=4)
    assert [each["nbytes"] for each in (await snapshot(fleet.store))["history"]] == [22, 21, 20, 12]


async def test_the_next_leader_counts_no_start_again_and_shows_it(replica: Replica) -> None:
    leader = await replica()
    await leader.announce(1)
    await leader.release(await leader.lease(intent="w"), Outcome(True))
    report = CacheResults({"torch_aot": "hit"}, 12.0)
    await leader.announce(2, intent="w", caches=report)
    new = await successor_of(leader, replica)
    await new.announce(2, intent="w", caches=report)
    assert [each.kinds().count("caches_reported") for each in (leader, new)] == [1, 0]
    (past,) = (await snapshot(new.store))["history"]
    assert past["caches"] == {"hits": ["torch_aot"], "misses": {}, "saved_s": 12.0}


async def test_the_next_leader_goes_on_counting_what_a_seed_served(replica: Replica) -> None:
    leader = await replica()
    await leader.announce(1)
    await leader.release(await leader.lease(), Outcome(True, nbytes=5))
    new = await successor_of(leader, replica)
    await new.release(await new.lease(), Outcome(True, nbytes=6))
    assert (await new.store.announce(Announcement(key="k", seed=seed(1))))[1] == Served(2, 11)


async def test_a_large_fleet_is_read_while_the_new_leader_shows_that_it_lives(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = await replica()
    await asyncio.gather(*(leader.announce(number, key=f"k{number % 7}") for number in range(2500)))
    await freeze(leader)
    read, written = FencedRecords.read, []

    async def slowly(self: FencedRecords, kind: str) -> AsyncIterator[list[tuple[str, bytes]]]:
        async for some in read(self, kind):
            seen = len(written)
            while len(written) == seen:
                await asyncio.sleep(0.005)
            yield some

    write = FencedRecords.write

    async def noted(self: FencedRecords, token: str, changes: Iterable[Change] = (), *, beat: str = "") -> None:
        changes = list(changes)
        await write(self, token, changes, beat=beat)
        written.extend(value for _, field, value in changes if field == "beat")

    monkeypatch.setattr(FencedRecords, "read", slowly)
    monkeypatch.setattr(FencedRecords, "write", noted)
    new = await until_leading(await replica(patience_s=0.1))
    assert sum(each.seeds for each in (await new.store.totals()).values()) == 2500
    assert len(set(written)) == len(written)


async def test_limits_that_are_lower_than_an_earlier_leaders_hold(
    replica: Replica, client: redis.asyncio.Redis, prefix: str
) -> None:
    leader = await replica()
    for number in range(5):
        await leader.announce(number)
    new = await successor_of(leader, replica, max_seeds=3)
    assert (await new.store.totals())["k"].seeds == 3
    await new.store.close()
    assert await client.hlen(f"{{{prefix}}}:2:seed") == 3


async def test_what_cannot_be_read_is_a_start_without_state(
    replica: Replica, client: redis.asyncio.Redis, prefix: str
) -> None:
    leader = await replica()
    state = await leader.announce(1)
    await leader.lease()
    await client.hset(f"{{{prefix}}}:2:lease", "rf1.x", '{"seed": "of another version"}')
    new = await successor_of(leader, replica)
    assert await new.announce(1, known_state=state) != state
    assert await new.ask() == Missed(), "the lease that could not be read may still be read under"
    assert await client.hlen(f"{{{prefix}}}:2:lease") == 0


async def test_data_of_the_generation_that_decided_in_redis_is_in_nobodys_way(
    replica: Replica, client: redis.asyncio.Redis, prefix: str
) -> None:
    base = f"{{{prefix}}}:"
    await client.hset(base + "meta", mapping={"state": "01234567", "born": "1.5"})
    await client.zadd(base + "due", {"lease|x": 5})
    await client.set(base + "leader", "text")
    fleet = await replica()
    await fleet.announce(1)
    await fleet.lease()
    assert await client.hget(base + "meta", "state") == b"01234567"


# --- writing ---------------------------------------------------------------------------------------------------------


class HeldWrites:
    """Writes of records that wait until they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.through = asyncio.Event()
        self.begun = asyncio.Event()
        self.count = 0
        write = FencedRecords.write

        async def held(records: FencedRecords, *arguments: Any, **named: Any) -> None:
            self.begun.set()
            await asyncio.wait_for(self.through.wait(), 30)  # a test that fails must not hang
            self.count += 1
            await write(records, *arguments, **named)

        monkeypatch.setattr(FencedRecords, "write", held)


async def test_nothing_is_answered_or_told_before_it_is_written(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = await replica()
    await freeze(fleet)
    waiting = await fleet.ask(wait_s=100)
    writes = HeldWrites(monkeypatch)
    announcing = asyncio.create_task(fleet.announce(1))
    await writes.begun.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    assert (announcing.done(), fleet.events, fleet.settled) == (False, [], [])
    writes.through.set()
    await announcing
    assert isinstance(waiting, Queued)
    assert (fleet.kinds(), fleet.settled) == (["seed_added"], [waiting.ticket])


async def test_what_was_not_written_never_happened(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    old = await replica()
    await old.announce(1)
    old.events.clear()
    writes = HeldWrites(monkeypatch)
    await freeze(old)
    asking = [asyncio.create_task(old.ask()) for _ in range(3)]
    announcing = asyncio.create_task(old.announce(2))
    await writes.begun.wait()
    monkeypatch.undo()
    new = await until_leading(await replica(patience_s=0.05))
    writes.through.set()
    for call in (*asking, announcing):
        with pytest.raises(StoreUnavailable):
            await call
    assert old.events == []
    assert (await new.store.totals())["k"].seeds == 1
    assert (await new.lease()).seed == seed(1)


async def test_decisions_during_a_write_share_the_next_one(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = await replica()
    await freeze(fleet)
    writes = HeldWrites(monkeypatch)
    calls = [asyncio.create_task(fleet.announce(0))]
    await writes.begun.wait()
    calls += [asyncio.create_task(fleet.announce(number, key=f"key{number}")) for number in range(1, 200)]
    writes.through.set()
    await asyncio.gather(*calls)
    assert writes.count == 2


async def test_a_receiver_that_hangs_up_during_the_write_leaves_no_lease(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = await replica()
    await freeze(fleet)
    await fleet.announce(1)
    writes = HeldWrites(monkeypatch)
    asking = asyncio.create_task(fleet.ask())
    await writes.begun.wait()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    writes.through.set()
    await fleet.lease()


async def test_a_redis_that_fails_ends_the_term_and_the_fleet_is_read_again(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = await replica(patience_s=0.3)
    await fleet.announce(1)
    lease = await fleet.lease()
    with monkeypatch.context() as broken:
        broken.setattr(FencedRecords, "_ask", _fail)
        with pytest.raises(StoreUnavailable, match="Redis is not reachable"):
            await fleet.ask()
        with pytest.raises(StoreUnavailable):
            await fleet.store.ping()
        await fleet.store.sweep()
    await until_leading(fleet)
    assert await fleet.ask() == Missed()
    await fleet.release(lease)


async def _fail(_: object, answer: Any) -> None:
    answer.close()
    raise StoreUnavailable("Redis is not reachable (test)")


async def test_a_redis_that_forgot_everything_is_a_start_without_state(
    replica: Replica, client: redis.asyncio.Redis, prefix: str
) -> None:
    fleet = await replica(patience_s=0.3)
    state = await fleet.announce(1)
    await fleet.lease()
    await client.delete(*await client.keys(f"{{{prefix}}}:*"))
    with contextlib.suppress(StoreUnavailable):  # its own beat may have found out first, and it may lead again
        await fleet.announce(2, key="other")
    await until_leading(fleet)
    assert await fleet.announce(1, known_state=state) != state
    assert await fleet.ask() == Missed()


async def test_no_decision_depends_on_the_clock_of_redis(
    replica: Replica, client: redis.asyncio.Redis, prefix: str
) -> None:
    """No script asks for the time and no key expires, so a clock that jumps changes nothing."""
    await client.config_resetstat()
    fleet = await replica()
    await fleet.announce(1)
    await fleet.store.intend("k", "i", "", 60)
    waiting = await fleet.ask(wait_s=10, intent="i2")
    lease = await fleet.lease() if not isinstance(waiting, Granted) else waiting
    await fleet.store.renew(lease.seed, lease.user_id)
    fleet = await successor_of(fleet, replica)
    await fleet.release(lease, Outcome(False, cause="SeedError"))
    used = {name.removeprefix("cmdstat_") for name in await client.info("commandstats")}
    allowed = {"hgetall", "hscan", "evalsha", "script|load", "hmget", "hset", "hdel", "del"}
    assert {"evalsha", "hset"} <= used <= allowed | {"info", "config|resetstat", "client|setinfo", "select", "ping"}
    keys = await client.keys(f"{{{prefix}}}:*")
    assert {await client.ttl(key) for key in keys} == {-1}


async def test_a_redis_that_forgot_the_script_is_told_again(replica: Replica, client: redis.asyncio.Redis) -> None:
    fleet = await replica()
    await fleet.announce(1)
    await client.script_flush()
    leases = await asyncio.gather(*(fleet.ask() for _ in range(10)))
    assert sum(isinstance(each, Granted) for each in leases) == 1


async def test_decisions_of_many_callers_are_answered_each_with_its_own(replica: Replica) -> None:
    fleet = await replica()
    await asyncio.gather(*(fleet.announce(number, key=f"key{number}") for number in range(200)))
    leases = await asyncio.gather(*(fleet.lease(f"key{number}") for number in range(200)))
    assert [each.seed for each in leases] == [seed(number) for number in range(200)]


async def test_probes_cost_redis_nothing(replica: Replica, client: redis.asyncio.Redis) -> None:
    store = (await replica()).store
    await client.ping()
    before = await client.info()
    await asyncio.gather(*(store.ping() for _ in range(300)))
    after = await client.info()
    assert after["connected_clients"] <= before["connected_clients"]
    assert after["total_commands_processed"] - before["total_commands_processed"] < 50


async def test_a_declined_decision_does_not_spoil_the_others(replica: Replica) -> None:
    fleet = await replica(max_seeds=1)
    done = await asyncio.gather(*(fleet.announce(number) for number in range(5)), return_exceptions=True)
    assert [isinstance(each, LimitReached) for each in done] == [False, True, True, True, True]


# --- presence --------------------------------------------------------------------------------------------------------


async def test_connections_end_with_their_leader_and_seeds_have_time_to_come_to_the_next(replica: Replica) -> None:
    leader = await replica()
    for number in (1, 2, 3):
        await leader.announce(number, slots=9)
    attending = [Announcement(key="k", seed=seed(number)) for number in (1, 2)]
    for each in attending:
        await leader.store.attend(each, held=True)
    await leader.store.leave(seed(2), await leader.store.attend(attending[1], held=True), answered=False)
    assert (await leader.store.totals())["k"].absent == 1
    next_leader = await successor_of(leader, replica)
    assert (await next_leader.store.totals())["k"].absent == 0, "it has not looked yet"
    await next_leader.store.attend(attending[0], held=True)
    next_leader.clock.pass_(next_leader.store.rules.presence_takeover_s)
    await next_leader.store.sweep()
    entries = {each["seed"]: each["absent"] for each in (await snapshot(next_leader.store))["seeds"]}
    # The second did not come; the third has never kept a connection, and lives by its heartbeats.
    assert entries == {str(seed(1)): False, str(seed(2)): True, str(seed(3)): False}


@pytest.mark.parametrize("who", ["another", "the same"])
async def test_a_replica_that_leads_no_longer_sends_its_seeds_to_the_next_leader(replica: Replica, who: str) -> None:
    leader = await replica()
    await leader.announce(1)
    presence, announced = Presence(leader.store, 100), Announcement(key="k", seed=seed(1))
    held = asyncio.create_task(presence.hold(announced, None))
    while not len(presence):
        await asyncio.sleep(0.01)
    if who == "another":
        next_leader = await successor_of(leader, replica)
        with pytest.raises(StoreUnavailable):
            await leader.lease()
    else:  # Redis did not answer once
        next_leader, term = leader, redis_store(leader).leadership.term
        assert term is not None
        term._lose([], StoreUnavailable("Redis is not reachable"))
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(held, 30)
    assert len(presence) == 0
    await redis_store(next_leader).leadership.look()
    again = asyncio.create_task(Presence(next_leader.store, 100).hold(announced, None))
    while not (await next_leader.seed_entry(1))["present"]:
        await asyncio.sleep(0.01)
    next_leader.clock.pass_(next_leader.store.rules.presence_takeover_s)
    await next_leader.store.sweep()
    assert not (await next_leader.seed_entry(1))["absent"]
    again.cancel()


async def test_nothing_expires_while_a_new_leader_reads(
    replica: Replica, client: redis.asyncio.Redis, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease that had expired meanwhile would stay in Redis for ever, because what is read is not written again."""
    first = await replica(claim_s=5.0)
    await first.announce(1)
    lease = await first.lease()
    await first.ask(wait_s=60)
    await first.release(lease, Outcome(True, 5, 1.0))  # and the one that waits has a lease, which it has not fetched
    read = FencedRecords.read

    async def slowly(records: FencedRecords, kind: str) -> AsyncIterator[list[tuple[str, bytes]]]:
        async for some in read(records, kind):
            first.clock.pass_(20.0)
            yield some

    monkeypatch.setattr(FencedRecords, "read", slowly)
    second = await successor_of(first, replica, claim_s=5.0)
    (kept,) = (await snapshot(second.store))["leases"]
    assert kept["expires_in_s"] == 5.0
    assert len(await client.hgetall(f"{{{prefix}}}:2:lease")) == 1
    second.clock.pass_(5.1)
    await second.store.sweep()
    assert await client.hgetall(f"{{{prefix}}}:2:lease") == {}
