"""Operators' orders: draining a seed and lifting its quarantine, on every store and over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.planner.conftest import Fleet, MakeFleet, seed
from tests.planner.test_api import Client, planner
from vllm_rfork.planner.store import operators
from vllm_rfork.planner.store.base import Granted, Missed, Queued
from vllm_rfork.planner.store.errors import LimitReached, UnknownSeed

SEED = {"SEED_KEY": "k", "SEED_IP": "127.0.0.1", "SEED_PORT": "5000"}
TOKEN = "operators-token"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}


async def drain(fleet: Fleet, name: int = 1, *, undo: bool = False) -> int:
    return await fleet.store.drain("k", seed(name), undo=undo)


async def test_a_drained_seed_gets_no_receiver_and_keeps_its_leases(fleet: Fleet) -> None:
    await fleet.announce(1, slots=2, epoch="e")
    lease = await fleet.lease()
    assert await drain(fleet) == 1
    assert await fleet.store.find("k") is None
    assert isinstance(await fleet.ask(), Missed)
    fleet.clock.pass_(40)
    await fleet.announce(1, slots=2, epoch="e")
    await fleet.store.renew(lease.seed, lease.user_id)
    assert isinstance(await fleet.ask(), Missed), "an announcement does not end it"
    await fleet.release(lease)
    assert await drain(fleet) == 0, "it is not dropped when its last lease ends"
    entry = await fleet.seed_entry(1)
    assert (entry["draining"], entry["drained"], entry["leases"]) == (True, True, 0)
    assert (await fleet.store.totals())["k"].draining == 1
    assert fleet.kinds().count("seed_drained") == 1


async def test_those_who_wait_for_a_drained_seed_alone_load_from_storage(fleet: Fleet) -> None:
    await fleet.announce(1, slots=1)
    await fleet.lease()
    queued = await fleet.ask(wait_s=60, intent="me", ticket="t")
    assert isinstance(queued, Queued)
    await drain(fleet)
    assert isinstance(await fleet.store.settle("t", leave=False), Missed)


async def test_a_drain_that_is_undone_serves_the_queue_at_once(fleet: Fleet) -> None:
    await fleet.announce(1, slots=1)
    await drain(fleet)
    assert isinstance(await fleet.ask(wait_s=60, ticket="t"), Queued)
    assert await drain(fleet, undo=True) == 1
    assert fleet.settled == ["t"]
    assert isinstance(await fleet.store.settle("t", leave=False), Granted)
    assert await drain(fleet, undo=True) == 1, "undoing twice changes nothing"
    assert fleet.kinds().count("seed_undrained") == 1


async def test_a_drain_outlives_staleness_and_ends_with_the_epoch(fleet: Fleet) -> None:
    await fleet.announce(1, epoch="first")
    await drain(fleet)
    fleet.clock.pass_(61)
    assert isinstance(await fleet.ask(), Missed)
    assert "seed_dropped" in fleet.kinds()
    await fleet.announce(1, epoch="first")
    assert isinstance(await fleet.ask(), Missed)
    await fleet.announce(1, epoch="second")
    await fleet.lease()
    await fleet.announce(1, epoch="first")
    await fleet.lease()


async def test_a_drain_of_a_seed_without_epochs_ends_when_it_is_dropped(fleet: Fleet) -> None:
    await fleet.announce(1)
    await drain(fleet)
    fleet.clock.pass_(61)
    await fleet.announce(1)
    await fleet.lease()


async def test_a_drained_seed_that_is_withdrawn_goes(fleet: Fleet) -> None:
    await fleet.announce(1)
    await drain(fleet)
    await fleet.store.withdraw("k", seed(1))
    with pytest.raises(UnknownSeed):
        await drain(fleet)


async def test_a_bounded_number_of_drains_is_kept(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "MAX_DRAINS", 2)
    for name in (1, 2, 3):
        await fleet.announce(name, epoch="e")
    await drain(fleet, 1)
    await drain(fleet, 2)
    with pytest.raises(LimitReached):
        await drain(fleet, 3)
    assert not (await fleet.seed_entry(3))["drained"]
    await fleet.store.withdraw("k", seed(1))
    await drain(fleet, 3)  # in place of the one whose seed is gone
    await fleet.announce(1, epoch="e")
    assert (await fleet.lease()).seed == seed(1)


async def test_a_lifted_quarantine_ends_at_once_and_forgets_its_failures(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(failures=2, backoff_s=10.0, slots=4)
    await fleet.announce(1)

    async def fail_twice() -> float:
        for receiver in ("a", "b"):
            await fleet.fail(await fleet.lease(receiver=receiver))
        return float(next(each.detail for each in reversed(fleet.events) if each.kind == "seed_aside"))

    assert await fail_twice() == 10
    assert isinstance(await fleet.ask(wait_s=60, ticket="t"), Queued)
    assert await fleet.store.lift("k", seed(1))
    assert fleet.settled == ["t"], "the queue is served at once"
    entry = await fleet.seed_entry(1)
    assert (entry["aside_s"], entry["failures"], entry["causes"]) == (0, 0, "")
    assert not await fleet.store.lift("k", seed(1))
    assert fleet.kinds().count("quarantine_lifted") == 1
    assert await fail_twice() == 10, "as short as the first one"


async def test_lifting_ends_neither_a_drain_nor_the_hold_after_a_lost_state(fleet: Fleet) -> None:
    await fleet.announce(1, known_state="earlier")
    await drain(fleet)
    assert not await fleet.store.lift("k", seed(1))
    await drain(fleet, undo=True)
    assert isinstance(await fleet.ask(), Missed)
    assert (await fleet.seed_entry(1))["held_s"] > 0


@pytest.mark.parametrize(("key", "name"), [("k", 2), ("other", 1)])
async def test_orders_about_unknown_seeds_change_nothing(fleet: Fleet, key: str, name: int) -> None:
    await fleet.announce(1)
    for undo in (False, True):
        with pytest.raises(UnknownSeed):
            await fleet.store.drain(key, seed(name), undo=undo)
    with pytest.raises(UnknownSeed):
        await fleet.store.lift(key, seed(name))
    await fleet.lease()


# --- over HTTP -------------------------------------------------------------------------------------------------------


async def order(client: Client, path: str, **headers: str) -> dict[str, Any]:
    status, answer, text = await client.call("POST", path, **{**SEED, **AUTHORIZATION, **headers})
    assert (status, answer.get("Content-Type", "").partition(";")[0]) == (200, "application/json"), text
    found: dict[str, Any] = json.loads(text)
    return found


async def test_orders_are_answered_with_the_state_of_the_seed() -> None:
    async with planner({"RFORK_TOKEN": TOKEN}) as client:
        await client.add(SEED_RANK="0", **AUTHORIZATION)
        await client.lease(**AUTHORIZATION)
        name = "127.0.0.1:5000:0"
        assert await order(client, "/rfork_drain") == {"seed": name, "draining": True, "leases": 1}
        assert await order(client, "/rfork_drain") == {"seed": name, "draining": True, "leases": 1}
        assert await client.status("GET", "/get_seed", SEED_KEY="k", **AUTHORIZATION) == 404
        undone = await order(client, "/rfork_drain", **{"RFORK-UNDO": "1"})
        assert undone == {"seed": name, "draining": False, "leases": 1}
        assert await order(client, "/rfork_lift") == {"seed": name, "was_quarantined": False}
        for path in ("/rfork_drain", "/rfork_lift"):
            assert await client.status("POST", path, **{**SEED, **AUTHORIZATION, "SEED_KEY": "x"}) == 404
        assert await client.status("POST", "/rfork_drain", **SEED, **AUTHORIZATION, **{"RFORK-UNDO": "yes"}) == 400


@pytest.mark.parametrize("path", ["/rfork_drain", "/rfork_lift"])
async def test_without_a_token_nobody_gives_orders(path: str) -> None:
    async with planner() as client:
        await client.add()
        status, _, text = await client.call("POST", path, **SEED)
        assert status == 403
        assert "--token-file" in text
        await client.lease()
    async with planner({"RFORK_TOKEN": TOKEN}) as client:
        await client.add(**AUTHORIZATION)
        assert await client.status("POST", path, **SEED) == 401
        assert await client.status("POST", path, **SEED, Authorization="Bearer other") == 401
        await client.lease(**AUTHORIZATION)
