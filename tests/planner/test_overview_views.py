"""The parts of the dashboard's data: models, searches, failures, fork trees, fingerprints, estimates."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.planner.conftest import Fleet, MakeFleet, seed
from tests.planner.test_api import Client, planner
from vllm_rfork.clients import PlannerClient
from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.policy import policy_named
from vllm_rfork.planner.store import fork_tree
from vllm_rfork.planner.store.base import Announcement, Outcome, Queued, Rules
from vllm_rfork.planner.store.key_use import KeyNames
from vllm_rfork.planner.store.memory import MemoryStore

Q, R = KeyNames("/models/q", "prod"), KeyNames("/models/r", "prod")


async def test_ranks_of_a_model_are_one_entry_and_unnamed_keys_are_models(fleet: Fleet) -> None:
    for rank in range(3):
        await fleet.announce(rank, key=f"q${rank}", names=Q)
    await fleet.announce(5, key="r$0", names=R)
    await fleet.announce(6, key="unnamed")
    await fleet.ask("q$3", intent="i", names=Q)
    shown = await fleet.store.overview()
    found = {
        (each["model"], each["strategy"], each["key"]): (each["keys"], each["seeds"], each["seedless"])
        for each in shown["models"]
    }
    assert found == {(*Q, ""): (4, 3, 1), (*R, ""): (1, 1, 0), ("", "", "unnamed"): (1, 1, 0)}
    assert (shown["models"][0]["model"], shown["fleet"]["models"]) == ("/models/q", 3)
    one = await fleet.store.overview(names=Q)
    assert [each["key"] for each in one["keys"]] == ["q$3", "q$0", "q$1", "q$2"]
    assert {each["key"] for each in one["seeds"]} == {"q$0", "q$1", "q$2"}
    assert (one["scope"]["seeds"], one["fleet"]["seeds"]) == (3, 5)
    assert (await fleet.store.overview(names=KeyNames("other")))["scope"] is None


async def test_forks_loads_and_saved_seconds_are_counted(fleet: Fleet) -> None:
    await fleet.ask(intent="loader", names=Q)
    fleet.clock.pass_(40)
    await fleet.announce(1, intent="loader", names=Q, slots=4)
    for outcome in (Outcome(True, duration_s=4.0), Outcome(False, cause="SeedError"), None):
        await fleet.release(await fleet.lease(), outcome)
    model = (await fleet.store.overview())["models"][0]
    assert {name: model[name] for name in ("forked", "loaded", "load_s")} == {"forked": 2, "loaded": 1, "load_s": 40}
    lease = await fleet.lease()
    fleet.clock.pass_(10)
    await fleet.release(lease, Outcome(True, duration_s=4.0))
    assert (await fleet.store.overview())["scope"]["saved_s"] == pytest.approx(72)


async def test_failures_outlast_the_successes_that_follow(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_history=4, slots=8)
    await fleet.announce(1)
    for number in range(6):
        await fleet.release(await fleet.lease(receiver=f"bad{number}"), Outcome(False, cause="ConfigError"))
    for _ in range(10):
        await fleet.release(await fleet.lease(), Outcome(True))
    shown = await fleet.store.overview()
    assert [each["receiver"] for each in shown["failures"]] == ["bad5", "bad4", "bad3", "bad2"]
    assert [each["result"] for each in shown["history"]] == ["ok"] * 4
    assert [(each["cause"], each["count"]) for each in shown["causes"]] == [("ConfigError", 4)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("POD-7", {"waiting": ["10.7.7.7"], "seeds": [], "leases": [], "intents": []}),
        ("rack9", {"waiting": [], "seeds": ["10.0.0.4:5000:0"], "leases": [], "intents": []}),
        ("node-l", {"waiting": [], "seeds": [], "leases": ["10.6.6.6"], "intents": []}),
        ("loader-pod", {"waiting": [], "seeds": [], "leases": [], "intents": ["loads"]}),
        ("0ddf", {"waiting": [], "seeds": ["10.0.0.4:5000:0"], "leases": [], "intents": []}),
        ("no such text", {"waiting": [], "seeds": [], "leases": [], "intents": []}),
    ],
)
async def test_any_name_of_a_worker_finds_it(fleet: Fleet, text: str, expected: dict[str, list[str]]) -> None:
    await fleet.announce(1, slots=1)
    await fleet.announce(2, key="calm")
    await fleet.announce(3, key="other", labels={"rack": "rack9"}, fingerprint="0DDF00")
    await fleet.lease(receiver="10.6.6.6", labels={"host": "node-l"})
    assert isinstance(await fleet.ask(wait_s=60, receiver="10.7.7.7", labels={"pod": "pod-7"}), Queued)
    await fleet.ask("new", intent="loads", labels={"pod": "loader-pod", "host": "h"})
    shown = await fleet.store.overview(find=text)
    assert [each["receiver"] for each in shown["waiting"]] == expected["waiting"]
    assert [each["seed"] for each in shown["seeds"]] == expected["seeds"]
    assert [each["address"] for each in shown["leases"]] == expected["leases"]
    assert [each["intent"] for each in shown["intents"]] == expected["intents"]
    assert {name: shown["found"][name] for name in expected} == {name: len(each) for name, each in expected.items()}
    assert len(shown["keys"]) == sum(map(len, expected.values()))
    assert shown["fleet"]["seeds"] == 3


async def test_a_search_finds_keys_models_and_past_forks(fleet: Fleet) -> None:
    await fleet.announce(1, key="a$0", names=Q, slots=2)
    await fleet.announce(2, key="b$0", names=R)
    await fleet.release(
        await fleet.lease("a$0", receiver="x", labels={"pod": "pod-x"}), Outcome(False, cause="SeedError")
    )
    assert [each["key"] for each in (await fleet.store.overview(find="models/R"))["keys"]] == ["b$0"]
    shown = await fleet.store.overview(find="pod-x")
    assert [each["pod"] for each in shown["failures"]] == ["pod-x"]
    assert (await fleet.store.overview(find="pod-x", names=R))["failures"] == []


async def test_the_names_of_pending_loaders_outlive_their_renewals(fleet: Fleet) -> None:
    await fleet.ask(intent="i", receiver="10.1.1.1", labels={"pod": "p", "host": "h"})
    await fleet.store.intend("k", "i", "", 60, address="10.9.9.9")
    await fleet.store.intend("k", "j", "", 60, address="10.9.9.9")
    fleet.clock.pass_(5)
    found = [(each["address"], each["host"], each["pod"]) for each in (await fleet.store.overview())["intents"]]
    assert found == [("10.1.1.1", "h", "p"), ("10.9.9.9", "", "")]


async def test_waits_and_loads_are_estimated_from_their_keys_own_times(fleet: Fleet) -> None:
    await fleet.ask(intent="first")
    fleet.clock.pass_(50)
    await fleet.announce(1, intent="first", slots=1)
    lease = await fleet.lease()
    fleet.clock.pass_(8)
    await fleet.release(lease, Outcome(True, duration_s=6.0))
    await fleet.announce(1, slots=1)
    await fleet.lease(receiver="reads")
    await fleet.ask(wait_s=100, receiver="waits")
    await fleet.ask("unmeasured", intent="x")
    shown = await fleet.store.overview()
    (waiter,) = shown["waiting"]
    assert (waiter["expected_s"], waiter["reason"], waiter["hold_s"], waiter["load_s"]) == (8.0, "busy", 8.0, 50.0)
    assert [each["expected_s"] for each in shown["leases"]] == [8.0]
    assert [each["expected_s"] for each in shown["intents"]] == [None]


# --- fingerprints ----------------------------------------------------------------------------------------------------


async def test_fingerprints_that_keep_workers_apart_are_shown_with_what_differs(fleet: Fleet) -> None:
    await fleet.announce(1, fingerprint="aa")
    await fleet.announce(2, fingerprint="aa")
    await fleet.announce(3, fingerprint="bb", differs="dtype: float16 here, bfloat16 on 2 seeds")
    await fleet.announce(4, key="alike", fingerprint="aa")
    await fleet.ask(fingerprint="cc", intent="i")
    shown = (await fleet.store.overview())["fingerprints"]
    assert [(each["key"], each["fingerprint"], each["seeds"], each["intents"]) for each in shown] == [
        ("k", "aa", 2, 0),
        ("k", "bb", 1, 0),
        ("k", "cc", 0, 1),
    ]
    assert (shown[1]["differs"], shown[1]["example"]) == ("dtype: float16 here, bfloat16 on 2 seeds", str(seed(3)))
    assert [each["fingerprint"] for each in (await fleet.store.overview(key="alike"))["fingerprints"]] == ["aa"]


# --- the fork tree ---------------------------------------------------------------------------------------------------


async def tree(fleet: Fleet, parents: dict[int, int | None]) -> list[tuple[int, str]]:
    for name, parent in parents.items():
        await fleet.announce(name, parent="" if parent is None else str(seed(parent)))
    shown = await fleet.store.overview(key="k")
    assert shown["tree_key"] == "k"
    return [(each["depth"], each.get("seed") or f"{each['more']} more") for each in shown["tree"]]


async def test_every_seed_follows_the_one_that_it_was_forked_from(fleet: Fleet) -> None:
    found = await tree(fleet, {1: None, 2: 1, 3: 1, 4: 3, 5: None})
    assert found == [(0, str(seed(1))), (1, str(seed(3))), (2, str(seed(4))), (1, str(seed(2))), (0, str(seed(5)))]


async def test_a_parent_that_is_gone_keeps_its_children_together(fleet: Fleet) -> None:
    assert await tree(fleet, {2: 9, 3: 9}) == [(0, str(seed(9))), (1, str(seed(2))), (1, str(seed(3)))]
    assert (await fleet.store.overview(key="k"))["tree"][0]["gone"]


async def test_addresses_that_are_used_again_close_no_circle(fleet: Fleet) -> None:
    found = await tree(fleet, {1: 2, 2: 3, 3: 1, 4: 4})
    assert sorted(each for _, each in found) == [str(seed(name)) for name in (1, 2, 3, 4)]


async def test_large_trees_are_cut_and_count_what_is_left_out(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_tree, "MAX_SIBLINGS", 3)
    assert (await tree(fleet, {1: None} | dict.fromkeys(range(2, 12), 1)))[-1] == (1, "7 more")
    monkeypatch.setattr(fork_tree, "MAX_ENTRIES", 2)
    assert await tree(fleet, {}) == [(0, str(seed(1))), (1, str(seed(9))), (1, "9 more")]


# --- over HTTP -------------------------------------------------------------------------------------------------------


async def asked(client: Client, query: str) -> dict[str, Any]:
    async with client.session.get(client.planner.url + "/dashboard.json", params=query) as answer:
        assert answer.status == 200
        found: dict[str, Any] = await answer.json()
        return found


async def test_views_are_asked_for_by_parameters() -> None:
    named = {"RFORK-MODEL": "m", "RFORK-STRATEGY": "s", "RFORK-PARENT": "10.9.9.9:1:0", "RFORK-LABELS": "pod=pod-1"}
    async with planner() as client:
        await client.add(5000, SEED_KEY="a", **named)
        await client.add(5001, SEED_KEY="b", **{"RFORK-PARENT": "not a seed"})
        assert [each["key"] for each in (await asked(client, "model=m&strategy=s"))["seeds"]] == ["a"]
        shown = await asked(client, "find=POD-1")
        assert ([each["key"] for each in shown["seeds"]], shown["find"]) == (["a"], "POD-1")
        whole = {each["key"]: each["parent"] for each in (await asked(client, ""))["seeds"]}
        assert whole == {"a": "10.9.9.9:1:0", "b": ""}
        assert await client.status("GET", f"/dashboard.json?find={'x' * 201}") == 400


async def test_a_worker_announces_its_parent_and_its_differences_cut_to_their_bound() -> None:
    async with planner() as client:
        worker = PlannerClient(client.planner.url)
        await worker.announce(
            "k", SeedAddress("127.0.0.1", 5000, 0), fingerprint="f", parent=str(seed(2)), differs="é" * 2000
        )
        (shown,) = (await asked(client, ""))["seeds"]
        assert shown["parent"] == str(seed(2))
        async with client.session.get(f"{client.planner.url}/dashboard.json", headers={"SEED_KEY": "k"}) as answer:
            (print_,) = (await answer.json())["fingerprints"]
        assert print_["differs"] == "é" * 1000


async def test_an_overview_of_5000_seeds_takes_less_than_a_second_of_cpu() -> None:
    store = MemoryStore(Rules(policy=policy_named("least-loaded")))
    for number in range(5000):
        announcement = Announcement(
            key=f"/models/m{number % 8}$prod$kv_both$0${number // 8 % 8}",
            seed=seed(number),
            names=KeyNames(f"/models/m{number % 8}", "prod"),
            labels={"host": f"node-{number}"},
            parent=str(seed(number - 64)) if number >= 64 else "",
        )
        await store.announce(announcement)
    for view in ({}, {"find": "node-77"}, {"key": "/models/m0$prod$kv_both$0$0"}):
        began = time.process_time()
        shown = await store.overview(**view)
        assert time.process_time() - began < 1.0
        assert 0 < len(shown["seeds"]) <= 100
