"""What every store must do: leases, waiting line, intents, failures, state loss. Run over memory and real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import redis.asyncio

from tests.planner.conftest import Fleet, MakeFleet, seed, snapshot
from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.policy import EVERYWHERE, policy_named
from vllm_rfork.planner.store.base import Announcement, Granted, Missed, Outcome, Queued, Rules
from vllm_rfork.planner.store.errors import LimitReached, StillLeased, UnknownLease, UnknownSeed
from vllm_rfork.planner.store.memory import MemoryStore

# --- leases ----------------------------------------------------------------------------------------------------------


async def test_one_slot_is_leased_once_until_it_is_released(fleet: Fleet) -> None:
    assert await fleet.ask() == Missed()
    await fleet.announce(1)
    lease = await fleet.lease()
    assert (lease.seed, lease.ttl_s) == (seed(1), 60.0)
    assert await fleet.ask() == Missed()
    await fleet.release(lease)
    assert (await fleet.lease()).user_id != lease.user_id


async def test_a_seed_carries_as_many_leases_as_it_announces_within_the_limit(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_slots=3)
    await fleet.announce(1, slots=2)
    await fleet.announce(2, key="other", slots=99)
    assert [type(await fleet.ask()) for _ in range(3)] == [Granted, Granted, Missed]
    assert [type(await fleet.ask("other")) for _ in range(4)] == [Granted] * 3 + [Missed]


async def test_fewer_announced_slots_count_at_once_and_end_no_lease(fleet: Fleet) -> None:
    await fleet.announce(1, slots=3)
    leases = [await fleet.lease(), await fleet.lease()]
    await fleet.announce(1, slots=1)
    await fleet.release(leases[0])
    assert await fleet.ask() == Missed()
    await fleet.release(leases[1])
    await fleet.lease()


async def test_a_lease_that_nobody_renews_ends_after_its_ttl(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    fleet.clock.pass_(59)
    assert await fleet.ask() == Missed()
    await fleet.announce(1)
    fleet.clock.pass_(1)
    await fleet.lease()
    assert "lease_expired" in fleet.kinds()
    with pytest.raises(UnknownLease):
        await fleet.store.renew(lease.seed, lease.user_id)


async def test_a_renewed_lease_lives_another_ttl(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    for _ in range(4):
        fleet.clock.pass_(50)
        await fleet.announce(1)
        await fleet.store.renew(lease.seed, lease.user_id)
        assert await fleet.ask() == Missed()
    assert await fleet.release(lease) == pytest.approx(200)


async def test_releasing_twice_or_from_another_seed_changes_nothing(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.announce(2)
    lease = await fleet.lease()
    other = next(each for each in (seed(1), seed(2)) if each != lease.seed)
    with pytest.raises(UnknownLease):
        await fleet.store.release(other, lease.user_id, None)
    with pytest.raises(UnknownLease):
        await fleet.store.renew(other, lease.user_id)
    await fleet.release(lease)
    second = [await fleet.lease(), await fleet.lease()]
    with pytest.raises(UnknownLease):
        await fleet.release(lease)
    assert await fleet.ask() == Missed()
    assert len(second) == 2


# --- seeds -----------------------------------------------------------------------------------------------------------


async def test_a_seed_that_is_not_heard_of_for_a_minute_goes(fleet: Fleet) -> None:
    await fleet.announce(1, slots=2)
    lease = await fleet.lease()
    fleet.clock.pass_(59)
    await fleet.announce(1, slots=2)
    fleet.clock.pass_(59)
    await fleet.store.renew(lease.seed, (await fleet.lease()).user_id)
    fleet.clock.pass_(1)
    assert await fleet.ask() == Missed()
    assert [each.detail for each in fleet.events if each.kind == "seed_dropped"] == ["stale"]
    assert await fleet.store.totals() == {}


async def test_announcing_under_another_key_moves_the_seed_and_ends_its_leases(fleet: Fleet) -> None:
    await fleet.announce(1, key="old")
    lease = await fleet.lease("old")
    await fleet.announce(1, key="new")
    assert await fleet.ask("old") == Missed()
    assert (await fleet.lease("new")).seed == seed(1)
    with pytest.raises(UnknownLease):
        await fleet.release(lease)


@pytest.mark.parametrize(("field", "before", "after"), [("epoch", "a", "b"), ("fingerprint", "a", "b")])
async def test_other_bytes_at_the_same_address_end_the_leases_on_the_earlier_ones(
    fleet: Fleet, field: str, before: str, after: str
) -> None:
    await fleet.announce(1, **{field: before})
    lease = await fleet.lease()
    await fleet.announce(1, **{field: before})
    await fleet.store.renew(lease.seed, lease.user_id)
    await fleet.announce(1, **{field: after})
    with pytest.raises(UnknownLease):
        await fleet.store.renew(lease.seed, lease.user_id)
    await fleet.lease()


async def test_a_withdrawn_seed_grants_no_more_and_may_come_back(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.store.withdraw("k", seed(1))
    assert await fleet.ask() == Missed()
    with pytest.raises(UnknownSeed):
        await fleet.store.withdraw("k", seed(1))
    await fleet.announce(1)
    await fleet.lease()


async def test_withdrawing_under_another_key_is_refused(fleet: Fleet) -> None:
    await fleet.announce(1)
    with pytest.raises(UnknownSeed):
        await fleet.store.withdraw("other", seed(1))
    await fleet.lease()


async def test_a_leased_seed_drains_whatever_its_heartbeat_says_and_goes_with_its_last_lease(fleet: Fleet) -> None:
    await fleet.announce(1, slots=3)
    leases = [await fleet.lease(), await fleet.lease()]
    for _ in range(2):
        with pytest.raises(StillLeased):
            await fleet.store.withdraw("k", seed(1))
        await fleet.announce(1, slots=3)
        assert await fleet.ask() == Missed()
    await fleet.release(leases[0])
    assert (await fleet.seed_entry(1))["draining"]
    await fleet.release(leases[1])
    with pytest.raises(UnknownSeed):
        await fleet.store.withdraw("k", seed(1))


async def test_a_draining_seed_whose_receiver_died_goes_after_one_ttl(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.lease()
    with pytest.raises(StillLeased):
        await fleet.store.withdraw("k", seed(1))
    fleet.clock.pass_(30)
    await fleet.announce(1)
    fleet.clock.pass_(30)
    await fleet.store.sweep()
    assert await fleet.store.totals() == {}


# --- pairing ---------------------------------------------------------------------------------------------------------


async def test_two_stated_fingerprints_must_be_equal_and_an_unstated_one_suits_all(fleet: Fleet) -> None:
    await fleet.announce(1, fingerprint="f")
    await fleet.announce(2)
    assert (await fleet.lease(fingerprint="g")).seed == seed(2)
    assert await fleet.ask(fingerprint="g") == Missed()
    assert (await fleet.lease(fingerprint="f")).seed == seed(1)
    await fleet.announce(3, fingerprint="h")
    assert (await fleet.lease()).seed == seed(3)


async def test_a_receiver_is_not_given_a_seed_that_it_excludes(fleet: Fleet) -> None:
    for name in (1, 2, 3):
        await fleet.announce(name)
    exclude = frozenset({str(seed(1)), str(seed(3))})
    assert (await fleet.lease(exclude=exclude)).seed == seed(2)
    assert await fleet.ask(exclude=exclude) == Missed()
    assert {(await fleet.lease()).seed, (await fleet.lease()).seed} == {seed(1), seed(3)}


async def test_any_text_can_be_a_key(fleet: Fleet) -> None:
    keys = ["模型$prod$kv_both$0$0", "a|b:c{d}", "a|b:c{d}$1", 'quote"\\', "UTF-8''x", "x" * 2048, "tab\t", "\udcff"]
    for number, key in enumerate(keys):
        await fleet.announce(number, key=key)
    assert set(await fleet.store.totals()) == set(keys)
    for number, key in enumerate(keys):
        assert (await fleet.lease(key)).seed == seed(number)
        assert (await snapshot(fleet.store, key=key))["seeds"][0]["key"] == key


# --- the waiting line ------------------------------------------------------------------------------------------------


async def settled(fleet: Fleet, queued: object, *, leave: bool = False, loads: bool = True) -> object:
    assert isinstance(queued, Queued)
    return await fleet.store.settle(queued.ticket, leave=leave, loads=loads)


async def test_the_line_is_served_in_order_and_nobody_overtakes(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    line = [await fleet.ask(wait_s=100) for _ in range(3)]
    for waiting in line:
        assert await settled(fleet, waiting) == waiting
        await fleet.release(lease)
        assert await fleet.ask() == Missed(), "a newcomer overtook the line"
        granted = await settled(fleet, waiting)
        assert isinstance(granted, Granted)
        lease = granted
    await fleet.release(lease)
    await fleet.lease()


async def test_a_settled_receiver_is_notified_at_once(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    waiting = await fleet.ask(wait_s=100)
    assert isinstance(waiting, Queued)
    await fleet.release(lease)
    deadline = time.monotonic() + 5
    while not fleet.settled and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
    assert fleet.settled == [waiting.ticket]


async def test_every_new_seed_serves_the_next_at_once(fleet: Fleet) -> None:
    line = [await fleet.ask(wait_s=100) for _ in range(5)]
    await fleet.announce(1)
    await fleet.announce(2, slots=2)
    granted = [await settled(fleet, waiting) for waiting in line]
    assert [type(each) for each in granted] == [Granted] * 3 + [Queued] * 2


async def test_keys_do_not_wait_for_each_other(fleet: Fleet) -> None:
    await fleet.ask("a", wait_s=100)
    waiting = await fleet.ask("b", wait_s=100)
    await fleet.announce(1, key="b")
    assert isinstance(await settled(fleet, waiting), Granted)


async def test_a_place_in_line_is_passed_over_only_by_those_whom_the_seed_suits(fleet: Fleet) -> None:
    other_print = await fleet.ask(wait_s=100, fingerprint="g")
    excluding = await fleet.ask(wait_s=100, fingerprint="f", exclude=frozenset({str(seed(1))}))
    suited = await fleet.ask(wait_s=100, fingerprint="f")
    unstated = await fleet.ask(wait_s=100)
    await fleet.announce(1, fingerprint="f", slots=2)
    assert isinstance(await settled(fleet, suited), Granted)
    assert isinstance(await settled(fleet, unstated), Granted)
    assert isinstance(await settled(fleet, excluding), Queued)
    await fleet.announce(2, fingerprint="f")
    assert isinstance(await settled(fleet, excluding), Granted)
    assert isinstance(await settled(fleet, other_print), Queued)


async def test_who_leaves_the_line_is_not_served(fleet: Fleet) -> None:
    first, second = await fleet.ask(wait_s=100), await fleet.ask(wait_s=100)
    assert await settled(fleet, first, leave=True) == Missed()
    assert await settled(fleet, first, leave=True) is None
    await fleet.announce(1)
    assert isinstance(await settled(fleet, second), Granted)


async def test_a_lease_that_its_waiting_receiver_never_fetches_goes_to_the_next(fleet: Fleet) -> None:
    first, second = await fleet.ask(wait_s=100), await fleet.ask(wait_s=100)
    await fleet.announce(1)
    fleet.clock.pass_(5)
    assert isinstance(await settled(fleet, second), Granted)
    assert await settled(fleet, first) is None


async def test_a_fetched_lease_has_its_full_ttl(fleet: Fleet) -> None:
    waiting = await fleet.ask(wait_s=100)
    await fleet.announce(1)
    fleet.clock.pass_(4)
    granted = await settled(fleet, waiting)
    assert isinstance(granted, Granted)
    fleet.clock.pass_(55)
    await fleet.announce(1)
    fleet.clock.pass_(4)
    await fleet.store.renew(granted.seed, granted.user_id)


async def test_an_expired_lease_serves_the_line_without_anybody_calling(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.lease()
    fleet.clock.pass_(30)
    await fleet.announce(1)
    waiting = await fleet.ask(wait_s=100)
    assert await fleet.store.sweep() == pytest.approx(30)
    fleet.clock.pass_(30)
    await fleet.store.sweep()
    assert isinstance(await settled(fleet, waiting), Granted)


async def test_a_long_line_makes_no_receiver_dearer(make_fleet: MakeFleet, request: pytest.FixtureRequest) -> None:
    work = []
    for length in (10, 300):
        fleet = await make_fleet()
        await fleet.store.intend("k", "loader", "", 600)
        for number in range(length):
            await fleet.ask(wait_s=60, intent=f"worker{number}")
        count = _commands(request) if not isinstance(fleet.store, MemoryStore) else _calls
        async with count() as counted:
            await fleet.store.settle("ticket0", leave=True)  # one gives up, one is served, the loading one lives on
            await fleet.announce(1)
            granted = await fleet.store.settle("ticket1", leave=False)
            assert isinstance(granted, Granted)
            await fleet.store.intend("k", "loader", "", 600)
            await fleet.release(granted)
        work.append(counted())
    assert work[1] < work[0] * 1.5, work


@contextlib.asynccontextmanager
async def _calls() -> AsyncIterator[Callable[[], int]]:
    """How many functions were called within."""
    number = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield lambda: number
    finally:
        sys.setprofile(before)


def _commands(request: pytest.FixtureRequest) -> Callable[[], AbstractAsyncContextManager[Callable[[], int]]]:
    """The same for the commands of Redis, those of scripts included."""

    @contextlib.asynccontextmanager
    async def count() -> AsyncIterator[Callable[[], int]]:
        async with redis.asyncio.Redis.from_url(request.getfixturevalue("redis_server").url, protocol=2) as client:

            async def number() -> int:
                stats = await client.info("commandstats")
                return sum(each["calls"] for name, each in stats.items() if name.startswith("cmdstat_"))

            before, after = await number(), 0
            yield lambda: after
            after = await number() - before

    return count


async def test_a_full_waiting_line_turns_receivers_away(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_waiters=2)
    first = await fleet.ask(wait_s=100)
    assert isinstance(await fleet.ask(wait_s=100), Queued)
    assert await fleet.ask(wait_s=100) == Missed()
    await settled(fleet, first, leave=True)
    assert isinstance(await fleet.ask(wait_s=100), Queued)


async def test_a_receiver_that_is_never_fetched_is_forgotten_after_its_wait(fleet: Fleet) -> None:
    await fleet.ask(wait_s=100)
    fleet.clock.pass_(111)
    await fleet.store.sweep()
    assert await fleet.store.totals() == {}


# --- intents: no stampede --------------------------------------------------------------------------------------------


async def test_of_many_that_start_together_one_loads_and_the_others_wait_for_it(fleet: Fleet) -> None:
    assert await fleet.ask(wait_s=100, intent="i0") == Missed(intent=True)
    line = [await fleet.ask(wait_s=100, intent=f"i{number}") for number in range(1, 10)]
    assert all(isinstance(each, Queued) for each in line)
    await fleet.announce(0, intent="i0")
    for number, waiting in enumerate(line):
        granted = await settled(fleet, waiting)
        assert isinstance(granted, Granted)
        assert granted.seed == seed(number), "each new seed serves the next"
        await fleet.announce(number + 1)
    totals = (await fleet.store.totals())["k"]
    assert (totals.intents, totals.waiting) == (0, 0)


async def test_who_does_not_wait_is_sent_to_storage_and_remembered(fleet: Fleet) -> None:
    assert await fleet.ask(intent="a") == Missed(intent=True)
    assert await fleet.ask(intent="b") == Missed(intent=True)
    assert await fleet.ask() == Missed(intent=False)
    assert (await fleet.store.totals())["k"].intents == 2


async def test_ones_own_intent_is_nothing_to_wait_for(fleet: Fleet) -> None:
    assert await fleet.ask(wait_s=100, intent="a") == Missed(intent=True)
    assert await fleet.ask(wait_s=100, intent="a") == Missed(intent=True)


@pytest.mark.parametrize("ends", ["withdrawn", "expired"])
async def test_when_the_loading_one_gives_up_exactly_one_other_loads(fleet: Fleet, ends: str) -> None:
    await fleet.ask(wait_s=100, intent="a")
    line = [await fleet.ask(wait_s=100, intent=name) for name in "bcd"]
    if ends == "withdrawn":
        await fleet.store.intend("k", "a", "", 0)
    else:
        fleet.clock.pass_(60)
        await fleet.store.sweep()
    assert await settled(fleet, line[0]) == Missed(intent=True)
    assert [type(await settled(fleet, each)) for each in line[1:]] == [Queued, Queued]


async def test_nobody_waits_for_one_that_went_away_while_it_waited(fleet: Fleet) -> None:
    await fleet.store.intend("k", "loading", "", 60)
    gone, told, last = [await fleet.ask(wait_s=30, intent=each) for each in ("gone", "told", "last")]
    assert await settled(fleet, gone, leave=True, loads=False) == Missed()
    await fleet.store.intend("k", "loading", "", 0)
    assert (await fleet.store.totals())["k"].intents == 1, "the next is to load, at once"
    assert await settled(fleet, told, leave=True, loads=False) == Missed(), "but has gone away before it heard of it"
    assert await settled(fleet, last) == Missed(intent=True)


async def test_a_renewed_intent_keeps_the_others_waiting(fleet: Fleet) -> None:
    await fleet.ask(wait_s=100, intent="a")
    waiting = await fleet.ask(wait_s=1000, intent="b")
    for _ in range(5):
        fleet.clock.pass_(50)
        await fleet.store.intend("k", "a", "", 60)
    assert isinstance(await settled(fleet, waiting), Queued)


async def test_a_seeds_death_tells_the_waiting_at_once(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.lease()
    line = [await fleet.ask(wait_s=1000, intent=name) for name in "ab"]
    fleet.clock.pass_(60)
    await fleet.store.sweep()
    assert await settled(fleet, line[0]) == Missed(intent=True)
    assert isinstance(await settled(fleet, line[1]), Queued)


async def test_a_draining_seed_is_nothing_to_wait_for(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.lease()
    waiting = await fleet.ask(wait_s=1000, intent="a")
    with pytest.raises(StillLeased):
        await fleet.store.withdraw("k", seed(1))
    assert await settled(fleet, waiting) == Missed(intent=True)


async def test_seeds_that_do_not_suit_are_nothing_to_wait_for(fleet: Fleet) -> None:
    await fleet.announce(1, fingerprint="f")
    assert await fleet.ask(wait_s=100, intent="a", fingerprint="g") == Missed(intent=True)
    excluding = await fleet.ask(wait_s=100, intent="b", fingerprint="f", exclude=frozenset({str(seed(1))}))
    assert excluding == Missed(intent=True)
    assert isinstance(await fleet.ask(wait_s=100, intent="c", fingerprint="g"), Queued), "a loads those very bytes"


async def test_without_an_intent_one_waits_whatever_there_is(fleet: Fleet) -> None:
    waiting = await fleet.ask(wait_s=100)
    assert isinstance(await settled(fleet, waiting), Queued)
    assert await settled(fleet, waiting, leave=True) == Missed(intent=False)


async def test_whose_wait_is_over_loads_and_is_remembered(fleet: Fleet) -> None:
    await fleet.ask(wait_s=100, intent="a")
    waiting = await fleet.ask(wait_s=100, intent="b")
    assert await settled(fleet, waiting, leave=True) == Missed(intent=True)
    assert (await fleet.store.totals())["k"].intents == 2


# --- seeds that fail -------------------------------------------------------------------------------------------------


async def test_a_seed_that_fails_several_receivers_is_quarantined_longer_each_time(fleet: Fleet) -> None:
    await fleet.announce(1)
    for backoff_s in (10, 20, 40):
        for number in range(3):
            await fleet.fail(await fleet.lease(receiver=f"10.9.0.{number}"))
        fleet.clock.pass_(backoff_s - 0.5)
        assert await fleet.ask() == Missed()
        await fleet.announce(1)
        fleet.clock.pass_(0.5)
    lease = await fleet.lease()
    await fleet.release(lease, Outcome(True))
    for number in range(2):
        await fleet.fail(await fleet.lease(receiver=f"10.9.0.{number}"))
    await fleet.lease()
    assert [float(each.detail) for each in fleet.events if each.kind == "seed_aside"] == [10, 20, 40]


async def test_one_receiver_that_fails_again_and_again_quarantines_nothing(fleet: Fleet) -> None:
    """It restarts in a loop: the seed stays for everybody else, also after a quarantine that others caused."""
    await fleet.announce(1)
    for _ in range(30):
        await fleet.fail(await fleet.lease(receiver="10.9.0.1", labels={"host": "node-1"}))
    assert "seed_aside" not in fleet.kinds()
    for number in range(2, 4):
        await fleet.fail(await fleet.lease(receiver=f"10.9.0.{number}"))
    assert fleet.kinds().count("seed_aside") == 1
    await fleet.announce(1)
    fleet.clock.pass_(10)
    for _ in range(30):
        await fleet.fail(await fleet.lease(receiver="10.9.0.1", labels={"host": "node-1"}))
    assert fleet.kinds().count("seed_aside") == 1


async def test_receivers_behind_one_address_are_told_apart_by_their_host(fleet: Fleet) -> None:
    await fleet.announce(1)
    causes = ("EngineError", "VerificationError", "SeedError")
    for number, cause in enumerate(causes):
        await fleet.fail(await fleet.lease(receiver="10.0.0.9", labels={"host": f"node-{number}"}), cause)
    (aside,) = [each for each in fleet.events if each.kind == "seed_aside"]
    expected = ", ".join(f"{cause} (10.0.0.9 (host=node-{n}))" for n, cause in enumerate(causes))
    assert aside.facts == {"seconds": 10, "causes": expected}
    assert (await fleet.seed_entry(1))["causes"] == expected


@pytest.mark.parametrize(("side", "quarantined"), [("receiver", False), ("seed", True), ("unknown", True), ("", True)])
async def test_a_receivers_own_failures_do_not_count(fleet: Fleet, side: str, quarantined: bool) -> None:
    await fleet.announce(1)
    for number in range(3):
        lease = await fleet.lease(receiver=f"10.9.0.{number}")
        await fleet.release(lease, Outcome(False, cause="EngineError", side=side))
    assert ("seed_aside" in fleet.kinds()) is quarantined


async def test_every_reported_fork_is_an_event_with_all_that_is_known(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease(receiver="10.9.0.1", labels={"host": "node-1"})
    await fleet.release(lease, Outcome(True, nbytes=4_000_000_000, duration_s=2.0, lane="nixl/rdma"))
    lease = await fleet.lease(receiver="10.9.0.2")
    await fleet.release(lease, Outcome(False, nbytes=7, duration_s=0.5, cause="EngineError", side="seed"))
    await fleet.release(await fleet.lease())  # without a word there is nothing to tell
    completed, failed = [each for each in fleet.events if each.kind.startswith("fork_")]
    assert (completed.kind, completed.key, completed.seed) == ("fork_ok", "k", str(seed(1)))
    assert completed.facts == {
        "receiver": "10.9.0.1 (host=node-1)",
        "nbytes": 4_000_000_000,
        "seconds": 2.0,
        "gb_per_s": 2.0,
        "lane": "nixl/rdma",
    }
    assert failed.kind == "fork_failed"
    assert failed.facts.items() >= {"receiver": "10.9.0.2", "cause": "EngineError", "side": "seed"}.items()


async def test_history_has_the_receivers_own_seconds_and_marks_what_is_the_leases(fleet: Fleet) -> None:
    await fleet.announce(1)
    for duration_s in (2.0, 0.0):
        lease = await fleet.lease()
        fleet.clock.pass_(50)  # post-processing of dummy weights, among other things
        await fleet.announce(1)
        await fleet.release(lease, Outcome(True, nbytes=4_000_000_000, duration_s=duration_s))
    shown = await fleet.store.overview()
    marked, own = shown["history"]
    assert (own["duration_s"], own["gb_per_s"], own["of_lease"]) == (2.0, 2.0, False)
    assert (marked["duration_s"], marked["of_lease"]) == (50.0, True)
    assert shown["forks"]["gb_per_s"] == 2.0, "the lease's duration says nothing about the wire"


async def test_a_lease_that_ends_by_itself_names_its_receiver(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.lease(receiver="10.9.0.1", labels={"host": "node-1"})
    fleet.clock.pass_(30)
    await fleet.announce(1)
    fleet.clock.pass_(31)
    await fleet.store.sweep()
    (expired,) = [each for each in fleet.events if each.kind == "lease_expired"]
    assert expired.facts == {"receiver": "10.9.0.1 (host=node-1)", "held_s": 61.0}


async def test_a_lease_is_known_by_its_id_and_address_whatever_the_rank(fleet: Fleet) -> None:
    """Newer receivers leave the rank out, which means 0; the seed has one."""
    ranked = SeedAddress("10.0.0.1", 5000, 3)
    await fleet.announce(ranked)
    lease = await fleet.lease()
    rankless = SeedAddress("10.0.0.1", 5000, 0)
    await fleet.store.renew(rankless, lease.user_id)
    await fleet.store.release(rankless, lease.user_id, None)
    assert (await fleet.lease()).seed == ranked


# --- why there is none -----------------------------------------------------------------------------------------------


async def missed(fleet: Fleet, **more: Any) -> Missed:
    result = await fleet.ask(**more)
    assert isinstance(result, Missed), result
    return result


async def test_every_miss_has_its_reason(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(failures=1)
    assert (await missed(fleet)).reason == "none"
    await fleet.announce(1, fingerprint="f")
    held = await fleet.lease(fingerprint="f")
    assert (await missed(fleet, fingerprint="f")).reason == "busy"
    assert (await missed(fleet)).reason == "busy"
    assert (await missed(fleet, fingerprint="g")).reason == "fingerprint"
    assert (await missed(fleet, fingerprint="f", exclude=frozenset({str(seed(1))}))).reason == "excluded"
    await fleet.fail(held)
    assert (await missed(fleet, fingerprint="f")).reason == "quarantined"
    assert (await missed(fleet, fingerprint="g")).reason == "fingerprint"
    await fleet.announce(2, fingerprint="f")
    assert (await missed(fleet, fingerprint="f", exclude=frozenset({str(seed(2))}))).reason == "quarantined"
    both = frozenset({str(seed(1)), str(seed(2))})
    assert (await missed(fleet, fingerprint="f", exclude=both)).reason == "excluded"


async def test_who_waited_in_vain_is_told_why(fleet: Fleet) -> None:
    await fleet.announce(1, fingerprint="f")
    await fleet.lease(fingerprint="f")
    waiting = await fleet.ask(fingerprint="f", wait_s=100)
    told = await settled(fleet, waiting, leave=True)
    assert isinstance(told, Missed)
    assert told.reason == "busy"


async def test_other_fingerprints_are_named_the_most_frequent_first(fleet: Fleet) -> None:
    number = 0
    for print_, seeds in (("a", 1), ("b", 3), ("c", 2), ("d", 5), ("e", 4)):
        for _ in range(seeds):
            number += 1
            await fleet.announce(number, fingerprint=print_)
    await fleet.announce(100)  # states none, and so differs from nobody
    others = (await missed(fleet, fingerprint="f", exclude=frozenset({str(seed(100))}))).others
    assert [(each.fingerprint, each.seeds) for each in others] == [("d", 5), ("e", 4), ("b", 3), ("c", 2)]
    assert others[2].example in (seed(2), seed(3), seed(4))
    assert (await missed(fleet, key="another", fingerprint="f")).others == ()
    await fleet.lease(fingerprint="a")
    assert [
        each.fingerprint for each in (await missed(fleet, fingerprint="a", exclude=frozenset({str(seed(100))}))).others
    ] == [
        "d",
        "e",
        "b",
        "c",
    ]
    fleet.clock.pass_(61)
    await fleet.store.sweep()
    assert (await missed(fleet, fingerprint="f")).others == (), "no seed of them is left"


async def test_what_is_not_the_seeds_fault_does_not_count(fleet: Fleet) -> None:
    await fleet.announce(1)
    for _ in range(10):
        await fleet.fail(await fleet.lease(), "ManifestMismatch")
        await fleet.release(await fleet.lease())
    await fleet.lease()


async def test_backoff_over_serves_the_line(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(failures=1)
    await fleet.announce(1)
    await fleet.fail(await fleet.lease())
    waiting = await fleet.ask(wait_s=100)
    assert await fleet.store.sweep() == pytest.approx(10)
    fleet.clock.pass_(10)
    await fleet.store.sweep()
    assert isinstance(await settled(fleet, waiting), Granted)


async def test_a_seed_put_aside_is_nothing_to_wait_for(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(failures=1)
    await fleet.announce(1)
    lease = await fleet.lease()
    waiting = await fleet.ask(wait_s=100, intent="a")
    await fleet.fail(lease)
    assert await settled(fleet, waiting) == Missed(intent=True)


# --- state that was lost ---------------------------------------------------------------------------------------------


async def test_a_seed_that_an_earlier_state_knew_is_held_until_no_forgotten_lease_can_live(
    make_fleet: MakeFleet,
) -> None:
    before = await make_fleet()
    state = await before.announce(1)
    forgotten = await before.lease()
    after = await make_fleet(like=before)  # same clock, no memory
    after.clock.pass_(5)
    assert await after.announce(1, known_state=state) != state
    assert await after.ask() == Missed(), "the forgotten lease's slot was granted again"
    waiting = await after.ask(wait_s=100, intent="a")
    await after.announce(2, known_state="")
    assert isinstance(granted := await settled(after, waiting), Granted)
    assert granted.seed == seed(2), "a seed that nobody knew is free"
    after.clock.pass_(54)
    await after.announce(1, known_state=state)
    assert await after.ask() == Missed()
    after.clock.pass_(1)
    assert (await after.lease()).seed == seed(1)
    with pytest.raises(UnknownLease):
        await after.release(forgotten)


@pytest.mark.parametrize("lease_comes_first", [True, False])
async def test_a_lease_of_an_earlier_state_is_taken_over_when_it_is_renewed(
    make_fleet: MakeFleet, lease_comes_first: bool
) -> None:
    before = await make_fleet()
    state = await before.announce(1)
    lease = await before.lease()
    after = await make_fleet(like=before)
    if lease_comes_first:
        await after.store.renew(lease.seed, lease.user_id)
        await after.announce(1, known_state=state)
    else:
        await after.announce(1, known_state=state)
        await after.store.renew(lease.seed, lease.user_id)
    assert await after.ask() == Missed()
    assert (await after.store.totals())["k"].leases == 1
    await after.release(lease)
    after.clock.pass_(59)
    await after.announce(1)
    assert await after.ask() == Missed(), "other leases that nobody remembers may still be read under"
    after.clock.pass_(1)
    assert (await after.lease()).seed == seed(1)


async def test_no_lease_is_taken_over_once_all_earlier_ones_have_run_out(make_fleet: MakeFleet) -> None:
    before = await make_fleet()
    await before.announce(1)
    lease = await before.lease()
    after = await make_fleet(like=before)
    for user_id in ("", "rf1.", "rf1.0.0", "someone", lease.user_id.replace("rf1.", "rf2.")):
        with pytest.raises(UnknownLease):
            await after.store.renew(lease.seed, user_id)
    after.clock.pass_(60)
    with pytest.raises(UnknownLease):
        await after.store.renew(lease.seed, lease.user_id)


async def test_a_lease_of_the_present_state_that_is_unknown_stays_unknown(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    await fleet.release(lease)
    with pytest.raises(UnknownLease):
        await fleet.store.renew(lease.seed, lease.user_id)


async def test_a_fleet_of_old_seeds_can_be_held_as_a_whole(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(recovery_hold_s=20.0)
    await fleet.announce(1)
    assert await fleet.ask() == Missed()
    fleet.clock.pass_(20)
    await fleet.lease()


# --- limits and views ------------------------------------------------------------------------------------------------


async def test_limits_hold_and_give_way_again(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_keys=2, max_seeds=3, max_intents=1)
    await fleet.announce(1, key="a")
    await fleet.announce(2, key="b")
    with pytest.raises(LimitReached):
        await fleet.announce(3, key="c")
    await fleet.announce(3, key="b")
    with pytest.raises(LimitReached):
        await fleet.announce(4, key="b")
    await fleet.announce(3, key="b")
    assert await fleet.ask("c", wait_s=10) == Missed()
    assert await fleet.ask("c", intent="i") == Missed(intent=False)
    await fleet.store.intend("a", "i", "", 60)
    await fleet.store.intend("a", "i", "", 60)
    with pytest.raises(LimitReached):
        await fleet.store.intend("a", "j", "", 60)
    await fleet.store.withdraw("a", seed(1))
    await fleet.store.intend("a", "i", "", 0)
    await fleet.announce(4, key="c")


async def test_views_show_who_does_what_and_no_whole_lease_id(fleet: Fleet) -> None:
    await fleet.announce(1, labels={"rack": "r1"}, epoch="e", fingerprint="f")
    done = await fleet.lease(receiver="10.9.9.9")
    fleet.clock.pass_(2)
    await fleet.release(done, Outcome(True, nbytes=4_000_000_000, duration_s=2.0))
    lease = await fleet.lease(receiver="10.9.9.9")
    await fleet.ask(wait_s=50, intent="i", receiver="10.8.8.8")
    await fleet.ask(wait_s=50, receiver="10.7.7.7", fingerprint="f")
    fleet.clock.pass_(3)
    found = await snapshot(fleet.store)
    assert lease.user_id not in json.dumps(found)
    assert lease.user_id.rpartition(".")[2][:8] not in json.dumps(found)
    (entry,) = found["seeds"]
    assert (entry["labels"], entry["slots"], entry["leases"], entry["seen_s_ago"]) == ({"rack": "r1"}, 1, 1, 5.0)
    (held,) = found["leases"]
    assert (held["receiver"], held["held_s"], held["expires_in_s"]) == ("10.9.9.9", 3.0, 57.0)
    assert [(each["place"], each["receiver"], each["waited_s"]) for each in found["waiting"]] == [
        (1, "10.8.8.8", 3.0),
        (2, "10.7.7.7", 3.0),
    ]
    (past,) = found["history"]
    assert (past["result"], past["gb_per_s"], past["ago_s"]) == ("ok", 2.0, 3.0)
    totals = (await fleet.store.totals())["k"]
    assert (totals.seeds, totals.slots, totals.leases, totals.waiting, totals.oldest_wait_s) == (1, 1, 1, 2, 3.0)
    assert found["keys"]["k"]["waiting"] == 2


async def test_a_snapshot_is_bounded(fleet: Fleet) -> None:
    for name in range(20):
        await fleet.announce(name, key=f"k{name}")
        await fleet.ask("none", wait_s=10)
    found = await snapshot(fleet.store, limit=5)
    assert max(len(each) for each in found.values() if isinstance(each, (list, dict))) == 5
    assert [each["seed"] for each in (await snapshot(fleet.store, key="k7"))["seeds"]] == [str(seed(7))]


async def test_labels_that_came_and_went_are_not_kept() -> None:
    store = MemoryStore(Rules(policy=policy_named("nearest")))
    await store.announce(Announcement(key="k", seed=seed(1), labels={"host": "stays"}))
    for number in range(50):
        await store.announce(Announcement(key="k", seed=seed(2), labels={"host": f"pod{number}"}))
    held = store.begin().keys["k"].pools
    assert {bucket for _, bucket in held} == {"host=stays", "host=pod49", EVERYWHERE}


async def test_history_is_bounded(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_history=3)
    await fleet.announce(1)
    for number in range(6):
        await fleet.release(await fleet.lease(), Outcome(True, nbytes=number))
    assert [each["nbytes"] for each in (await snapshot(fleet.store))["history"]] == [5, 4, 3]
