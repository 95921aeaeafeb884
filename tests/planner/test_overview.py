"""What the dashboard is given, by either store: who does what, the urgent first, bounded however large the fleet."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.planner.conftest import Fleet, MakeFleet, seed, snapshot
from vllm_rfork.planner.store import overview
from vllm_rfork.planner.store.base import Outcome, Totals

LISTS = ("keys", "seeds", "leases", "waiting", "intents", "history", "causes")


async def test_it_shows_who_does_what_and_since_when(fleet: Fleet) -> None:
    await fleet.announce(1, labels={"rack": "r1"})
    done = await fleet.lease(receiver="10.9.9.9")
    fleet.clock.pass_(2)
    await fleet.release(done, Outcome(True, nbytes=4_000_000_000, duration_s=2.0))
    fleet.clock.pass_(1)
    lease = await fleet.lease(receiver="10.9.9.8")
    await fleet.ask(wait_s=50, receiver="10.8.8.8")
    fleet.clock.pass_(3)
    await fleet.ask(wait_s=40, receiver="10.7.7.7")
    await fleet.ask("new", intent="worker-7")
    shown = await fleet.store.overview()
    assert lease.user_id.rpartition(".")[2][:8] not in json.dumps(shown)
    assert [(each["key"], each["seeds"], each["waiting"], each["intents"]) for each in shown["keys"]] == [
        ("k", 1, 2, 0),
        ("new", 0, 0, 1),
    ]
    assert {name: shown["fleet"][name] for name in vars(Totals())} | {"oldest_wait_s": 0} == {
        **dict.fromkeys(vars(Totals()), 0),
        **{"seeds": 1, "slots": 1, "leases": 1, "waiting": 2, "intents": 1},
    }
    assert (shown["fleet"]["keys"], shown["fleet"]["oldest_wait_s"]) == (2, 3.0)
    (held,) = shown["leases"]
    assert (held["receiver"], held["seed"], held["key"], held["held_s"]) == ("10.9.9.8", str(seed(1)), "k", 3.0)
    assert [(each["place"], each["receiver"], each["waited_s"], each["wait_s"]) for each in shown["waiting"]] == [
        (1, "10.8.8.8", 3.0, 50),
        (2, "10.7.7.7", 0.0, 40),
    ]
    assert [(each["key"], each["intent"]) for each in shown["intents"]] == [("new", "worker-7")]
    (past,) = shown["history"]
    assert (past["receiver"], past["nbytes"], past["gb_per_s"], past["ago_s"]) == ("10.9.9.9", 4_000_000_000, 2.0, 4.0)
    assert shown["forks"] == {
        **{"count": 1, "ok": 1, "failed": 0, "released": 0, "expired": 0},
        **{"nbytes": 4_000_000_000, "gb_per_s": 2.0, "since_s": 4.0},
    }


async def test_seeds_in_trouble_and_keys_with_a_line_come_first(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(failures=1, backoff_s=60)
    for number in range(8):
        await fleet.announce(number, key="a calm one")
    await fleet.lease("a calm one")
    await fleet.announce(10, key="bad")
    await fleet.announce(11, key="bad")
    await fleet.fail(await fleet.lease("bad"))
    await fleet.announce(20, key="line")
    held = await fleet.lease("line")
    await fleet.ask("line", wait_s=10)
    with pytest.raises(Exception, match="draining"):
        await fleet.store.withdraw("line", held.seed)
    shown = await fleet.store.overview(limit=10)
    assert [each["key"] for each in shown["keys"]] == ["line", "bad", "a calm one"]
    assert [each["seed"] for each in shown["seeds"]][:2] == [str(seed(20)), str(seed(10))]
    assert (shown["seeds"][0]["draining"], shown["seeds"][1]["aside_s"]) == (True, 60.0)
    assert (shown["fleet"]["aside"], shown["fleet"]["draining"], shown["fleet"]["seeds"]) == (1, 1, 11)
    assert [(each["cause"], each["count"], each["seed"]) for each in shown["causes"]] == [
        ("EngineError", 1, str(seed(10)))
    ]


async def test_failures_are_counted_by_cause_the_youngest_shown(fleet: Fleet) -> None:
    for number in range(3):
        await fleet.announce(number)
    for cause in ("SeedError", "EngineError", "SeedError"):
        await fleet.fail(await fleet.lease(), cause)
        fleet.clock.pass_(1)
    await fleet.lease()
    for number in range(3):
        fleet.clock.pass_(25)
        await fleet.announce(number)
        await fleet.announce(1)
        await fleet.announce(2)
    causes = (await fleet.store.overview())["causes"]
    assert [(each["cause"], each["count"], each["ago_s"]) for each in causes] == [
        ("SeedError", 2, 76.0),
        ("EngineError", 1, 77.0),
        ("expired", 1, causes[2]["ago_s"]),
    ]


async def test_it_is_bounded_and_every_key_can_be_looked_at(fleet: Fleet) -> None:
    for number in range(120):
        await fleet.announce(number, key=f"k{number % 40:02d}")
        await fleet.ask("busy", wait_s=10)
        await fleet.ask("none", intent=f"i{number}")
    for number in range(60):
        lease = await fleet.lease(f"k{number % 40:02d}")
        if number >= 30:
            await fleet.release(lease, Outcome(False, cause=f"Cause{number}"))
    shown = await fleet.store.overview(limit=10)
    assert max(len(shown[name]) for name in LISTS if name != "causes") == 10
    assert len(shown["causes"]) <= overview.MAX_CAUSES + 1
    assert sum(each["count"] for each in shown["causes"]) == shown["forks"]["failed"] == 30
    there = {name: shown["fleet"][name] for name in ("keys", "seeds", "leases", "waiting", "intents")}
    assert there == {"keys": 42, "seeds": 120, "leases": 30, "waiting": 120, "intents": 120}
    assert shown["keys"][0]["key"] == "busy"
    last = await fleet.store.overview(key="k39", limit=10)
    assert [each["key"] for each in last["keys"]] == [*(each["key"] for each in shown["keys"]), "k39"]
    assert {each["seed"] for each in last["seeds"]} == {str(seed(number)) for number in (39, 79, 119)}
    assert last["waiting"] == last["leases"] == []
    assert {each["key"] for each in last["history"]} == {"k39"}
    unknown = await fleet.store.overview(key="no such key", limit=10)
    assert [unknown[name] for name in LISTS if name != "keys"] == [[]] * 6


async def test_a_key_with_many_seeds_is_cut_with_its_trouble_first(fleet: Fleet) -> None:
    for number in range(200):
        await fleet.announce(number)
    held = [await fleet.lease() for _ in range(6)]
    with pytest.raises(Exception, match="draining"):
        await fleet.store.withdraw("k", held[3].seed)
    shown = await fleet.store.overview(key="k", limit=20)
    assert (len(shown["seeds"]), shown["keys"][0]["seeds"]) == (20, 200)
    assert shown["seeds"][0]["seed"] == str(held[3].seed)
    assert {each["seed"] for each in shown["leases"]} == {str(each.seed) for each in held}, "of seeds not shown too"


async def test_leases_are_shown_from_grant_to_end_whatever_ends_them(fleet: Fleet) -> None:
    async def receivers(key: str | None = None) -> list[str]:
        return [each["receiver"] for each in (await fleet.store.overview(key=key))["leases"]]

    for number in range(4):
        await fleet.announce(number)
    first = await fleet.lease(receiver="a")
    fleet.clock.pass_(1)
    second = await fleet.lease(receiver="b")
    fleet.clock.pass_(1)
    third = await fleet.lease(receiver="c")
    assert await receivers() == await receivers("k") == ["a", "b", "c"]
    await fleet.release(first)
    assert await receivers() == ["b", "c"]
    await fleet.announce(third.seed, fingerprint="other")  # comes back as another seed: its leases go
    assert await receivers() == ["b"]
    fleet.clock.pass_(30)
    for number in range(4):
        await fleet.announce(number)
    fleet.clock.pass_(29.5)
    assert await receivers() == []
    assert second.ttl_s == 60


async def test_a_snapshot_shows_the_leases_of_seeds_beyond_its_limit(fleet: Fleet) -> None:
    for number in range(30):
        await fleet.announce(number)
    held = [await fleet.lease() for _ in range(5)]
    shown = (await snapshot(fleet.store, limit=5))["leases"]
    assert {each["seed"] for each in shown} == {str(each.seed) for each in held}


async def test_others_have_their_turn_while_many_keys_are_counted(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "BATCH", 10)
    fleet = await make_fleet()
    for number in range(300):
        await fleet.announce(number, key=f"k{number}")
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await fleet.store.totals() if turns % 10 == 0 else await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(other())
    shown = await fleet.store.overview(limit=5)
    task.cancel()
    assert (shown["fleet"]["keys"], shown["fleet"]["seeds"]) == (300, 300)
    assert turns >= 10
