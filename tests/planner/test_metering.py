"""Measurements that the planner sends to workers for their own metrics: forks that a seed served, a load's time."""

from __future__ import annotations

from tests.planner.conftest import Fleet, MakeFleet, seed
from tests.planner.test_api import ADD, planner
from vllm_rfork.messages.metering import Served, parse_served
from vllm_rfork.planner.store.base import Announcement, Outcome


async def _served(fleet: Fleet, number: int, **announced: str) -> Served:
    return (await fleet.store.announce(Announcement(key="k", seed=seed(number), **announced)))[1]


async def test_a_seed_learns_of_the_forks_from_it(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(slots=4)
    assert await _served(fleet, 1, epoch="e1") == Served(0, 0)
    failed = Outcome(False, nbytes=500, cause="SeedError")
    for outcome in (Outcome(True, nbytes=30), failed, None, Outcome(True, nbytes=12)):
        await fleet.release(await fleet.lease(), outcome)
    assert await _served(fleet, 1, epoch="e1") == Served(2, 42)
    assert await _served(fleet, 2) == Served(0, 0), "of another seed"
    assert await _served(fleet, 1, epoch="e2") == Served(0, 0), "other weights"


async def test_the_totals_of_a_seed_are_in_the_answer_to_its_heartbeat() -> None:
    async with planner() as client:
        await client.add()
        told = {"RFORK-RESULT": "ok", "RFORK-NBYTES": "7000000000"}
        assert await client.status("POST", "/put_seed", **await client.lease(), **told) == 200
        answer = (await client.call("POST", "/add_seed", **ADD))[1]
    assert parse_served(answer["RFORK-SERVED"]) == Served(1, 7_000_000_000)


async def test_a_lease_states_the_measured_time_of_a_load(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(slots=4)
    await fleet.announce(0)
    assert (await fleet.lease()).load_s == 0, "nothing was measured"
    await fleet.store.intend("k", "loader", "", 60)
    fleet.clock.pass_(41.5)
    await fleet.announce(1, intent="loader")
    assert (await fleet.lease()).load_s == 41.5
    assert (await fleet.lease(keeps=True, ticket="t")).load_s == 41.5


async def test_the_time_of_a_load_is_in_the_answer_if_it_is_known() -> None:
    async with planner(slots=9) as client:
        await client.add()
        get = "GET", "/get_seed"
        assert "RFORK-STORAGE-SEC" not in (await client.call(*get, SEED_KEY="k"))[1]
        assert await client.status("POST", "/rfork_intent", SEED_KEY="k", **{"RFORK-INTENT": "w"}) == 200
        await client.add(5001, **{"RFORK-INTENT": "w"})
        assert 0 < float((await client.call(*get, SEED_KEY="k"))[1]["RFORK-STORAGE-SEC"]) < 60
