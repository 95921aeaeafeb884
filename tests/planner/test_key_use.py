"""Names of keys for people, and the results of their receivers: kept by key, also for a successor."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planner.conftest import Fleet, MakeFleet, snapshot
from tests.planner.test_api import planner
from vllm_rfork.messages import encode_text
from vllm_rfork.planner.store.base import Outcome
from vllm_rfork.planner.store.key_use import KeyNames, KeyUse

NAMES = KeyNames("/models/q", "prod")


async def test_any_call_of_a_worker_names_its_key(fleet: Fleet) -> None:
    await fleet.announce(1, key="announced", names=NAMES)
    await fleet.ask("asked", names=NAMES)
    await fleet.store.intend("loading", "i", "", 60, names=NAMES)
    assert [fleet.store.names_of(key) for key in ("announced", "asked", "loading")] == [NAMES] * 3
    await fleet.announce(1, key="announced")
    assert fleet.store.names_of("announced") == NAMES, "an older worker of the same key does not remove them"
    assert fleet.store.names_of("unknown") == KeyNames()


async def test_no_receiver_renames_a_key(fleet: Fleet) -> None:
    await fleet.ask(names=KeyNames("first", "s"))
    await fleet.ask(names=KeyNames("evil", "s"))
    assert fleet.store.names_of("k").model == "first"
    await fleet.announce(1, names=NAMES)
    assert fleet.store.names_of("k") == NAMES, "its first seed knows better"
    await fleet.ask(names=KeyNames("evil", "s"))
    await fleet.store.intend("k", "i", "", 60, names=KeyNames("evil", "s"))
    await fleet.announce(2, names=KeyNames("evil", "s"))
    assert fleet.store.names_of("k") == NAMES


async def test_the_names_of_forgotten_keys_make_room_first(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_keys=2)
    await fleet.announce(1, key="stays", names=NAMES)
    for number in range(5):
        await fleet.ask(f"asked{number}", names=NAMES)
    known = [key for key in ("stays", *(f"asked{number}" for number in range(5))) if fleet.store.names_of(key).model]
    assert known == ["stays", "asked4"]


def test_a_fork_saves_what_a_measured_load_would_have_taken_longer() -> None:
    use = KeyUse()
    assert [use.add_fork(*each) for each in ((2.0, 60.0), (0.0, 60.0), (2.0, 0.0), (70.0, 60.0))] == [58.0, 0, 0, 0]
    assert (use.forked, use.saved_s) == (4, 58.0)


async def test_released_forks_report_the_time_that_they_saved(fleet: Fleet) -> None:
    await fleet.ask(intent="loader")
    fleet.clock.pass_(20)
    await fleet.store.intend("k", "loader", "", 60)
    fleet.clock.pass_(1)
    await fleet.announce(1, intent="loader")
    lease = await fleet.lease()
    fleet.clock.pass_(4)
    released = await fleet.store.release(lease.seed, lease.user_id, Outcome(True, duration_s=3.0))
    assert released.saved_s == pytest.approx((await snapshot(fleet.store))["times"][0]["load_s"] - 3)


@pytest.mark.parametrize("call", [("POST", "/add_seed"), ("GET", "/get_seed"), ("POST", "/rfork_intent")])
async def test_names_are_read_from_every_call_and_are_bounded(call: tuple[str, str]) -> None:
    sent: dict[str, Any] = {"SEED_KEY": "k", "SEED_IP": "127.0.0.1", "SEED_PORT": "1", "RFORK-INTENT": "i"}
    async with planner() as client:
        names = {"RFORK-MODEL": encode_text("modèle"), "RFORK-STRATEGY": "prod"}
        await client.status(*call, **sent, **names)
        assert client.planner.store.names_of("k") == KeyNames("modèle", "prod")
        await client.status(*call, **sent | {"SEED_KEY": "long", "RFORK-MODEL": "x" * 256})
        assert client.planner.store.names_of("long") == KeyNames("x" * 255)
        unusable = dict.fromkeys(["RFORK-MODEL", "RFORK-STRATEGY", "RFORK-DIFFERS"], "UTF-8''%ff")
        assert await client.status(*call, **sent | {"SEED_KEY": "unusable"} | unusable) != 400
        assert client.planner.store.names_of("unusable") == KeyNames()
