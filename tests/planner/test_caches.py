"""Caches of seeds: a seed is named without a lease, and the reports of starts are counted and shown once."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import aiohttp
import pytest

from tests.planner.conftest import Fleet, MakeFleet, seed
from tests.planner.test_api import SEED, Client, planner
from tests.unit.interop_planners import load_mock_planner, serve
from vllm_rfork.caches.manifest import LEVELS
from vllm_rfork.clients import Outcome, PlannerClient
from vllm_rfork.messages import CacheResults, SeedAddress, parse_cache_results
from vllm_rfork.planner.store.base import Announcement
from vllm_rfork.planner.store.errors import StillLeased

REPORT = "torch_aot=hit,triton=miss:identity,model_info=hit;saved=38.2"
WORKER = {"RFORK-INTENT": "worker-7"}


async def metrics(client: Client) -> dict[str, str]:
    page = (await client.call("GET", "/metrics"))[2]
    return dict(re.findall(r"^rfork_planner_(cache\S+) (\S+)$", page, re.MULTILINE))


async def test_a_start_is_counted_once_and_shown_at_its_fork() -> None:
    async with planner() as client:
        await client.add(5000)
        lease = await client.lease(**WORKER)
        await client.status("POST", "/put_seed", **lease, **{"RFORK-RESULT": "ok"})
        await client.add(5001, **WORKER)
        for _ in range(3):  # heartbeats repeat it
            assert await client.add(5001, **WORKER, **{"RFORK-CACHES": REPORT}) == 200
        assert await metrics(client) == {
            'caches_total{kind="torch_aot",result="hit"}': "1.0",
            'caches_total{kind="model_info",result="hit"}': "1.0",
            'caches_total{kind="triton",result="identity"}': "1.0",
            "cache_saved_seconds_total": "38.2",
        }
        for path in ("/debug/snapshot", "/dashboard.json"):
            (past,) = json.loads((await client.call("GET", path))[2])["history"]
            assert past["caches"] == {
                **{"hits": ["torch_aot", "model_info"], "misses": {"triton": "identity"}, "saved_s": 38.2}
            }
            assert "worker" not in past


async def test_a_seed_that_returns_is_not_counted_again() -> None:
    async with planner() as client:
        await client.add(5000, **WORKER, **{"RFORK-CACHES": REPORT})
        assert await client.status("POST", "/remove_seed", SEED_KEY="k", **SEED) == 200
        await client.add(5000, **{"RFORK-CACHES": REPORT})  # it states no intent after a sleep
        assert (await metrics(client))["cache_saved_seconds_total"] == "38.2"


async def test_a_seed_that_was_silent_for_a_while_is_not_counted_again(make_fleet: MakeFleet) -> None:
    """Its heartbeat goes on, and repeats the intent."""
    fleet = await make_fleet(max_intents=2)
    announced = {"intent": "worker-0", "caches": parse_cache_results(REPORT)}
    await fleet.announce(0, **announced)
    fleet.clock.pass_(fleet.store.rules.stale_s + 1)
    await fleet.store.sweep()
    assert "seed_dropped" in fleet.kinds()
    await fleet.announce(0, **announced)
    assert fleet.kinds().count("caches_reported") == 1
    for number in (1, 2, 3):
        await fleet.announce(number, intent=f"worker-{number}", caches=announced["caches"])
    assert fleet.kinds().count("caches_reported") == 4, "there is a bound for those that are remembered"


@pytest.mark.parametrize(
    "text", ["", ";", "saved=3", "x" * 401, "Torch=hit", "torch_aot=maybe", "a=miss:Ünsinn", "=hit"]
)
async def test_a_report_that_cannot_be_read_costs_the_seed_nothing(text: str) -> None:
    async with planner() as client:
        assert await client.add(5000, **WORKER, **{"RFORK-CACHES": text}) == 200
        assert await metrics(client) == {"cache_saved_seconds_total": "0.0"}


async def test_kinds_and_reasons_that_workers_make_up_share_their_series() -> None:
    async with planner() as client:
        for number, word in enumerate(("aa", "bb", "cc")):
            made_up = {"RFORK-CACHES": f"{word}=hit,x{word}=miss:{word},inductor=miss:{word}"}
            await client.add(5000 + number, **WORKER, **made_up)
        assert await metrics(client) == {
            'caches_total{kind="(other)",result="hit"}': "3.0",
            'caches_total{kind="(other)",result="(other)"}': "3.0",
            'caches_total{kind="inductor",result="(other)"}': "3.0",
            "cache_saved_seconds_total": "0.0",
        }
        every = {"RFORK-CACHES": str(CacheResults(dict.fromkeys(LEVELS, "hit")))}
        await client.add(6000, **WORKER, **every)
        assert {f'caches_total{{kind="{kind}",result="hit"}}' for kind in LEVELS} < set(await metrics(client))


@contextlib.asynccontextmanager
async def mock_planner() -> AsyncIterator[str]:
    mock = load_mock_planner()
    async with serve(mock.make_app(mock.Planner())) as url:
        yield url


@contextlib.asynccontextmanager
async def this_planner() -> AsyncIterator[str]:
    async with planner() as client:
        yield client.planner.url


@pytest.mark.parametrize("start", [this_planner, mock_planner])
async def test_seeds_are_found_in_turn_without_a_lease(start: Callable[[], AbstractAsyncContextManager[str]]) -> None:
    async with start() as url, aiohttp.ClientSession() as session:
        client = PlannerClient(url)
        assert await client.find_seed("k") is None
        seeds = [SeedAddress("127.0.0.1", port, 3) for port in (5000, 5001)]
        for each in seeds:
            await client.announce("k", each, slots=1)
        for _ in range(2):
            assert {await client.find_seed("k") for _ in seeds} == set(seeds)
        assert await client.find_seed("other") is None
        async with session.get(url + "/rfork_find_seed") as answer:
            assert (answer.status, await answer.text()) == (400, "missing header SEED_KEY\n")
        for each in seeds:
            assert await client.withdraw("k", each) is Outcome.DONE, "nobody has a lease"
        assert await client.find_seed("k") is None


async def test_seeds_that_cannot_answer_are_not_found(fleet: Fleet) -> None:
    for number in range(3):
        await fleet.announce(number)
    connection = await fleet.store.attend(Announcement(key="k", seed=seed(0)), held=True)
    await fleet.store.leave(seed(0), connection, answered=False)
    held = await fleet.lease()
    with pytest.raises(StillLeased):
        await fleet.store.withdraw("k", held.seed)
    (left,) = {seed(1), seed(2)} - {held.seed}
    assert {await fleet.store.find("k") for _ in range(3)} == {left}
    fleet.clock.pass_(61)
    assert await fleet.store.find("k") is None
