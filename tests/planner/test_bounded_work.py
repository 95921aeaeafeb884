"""The work of one decision is bounded, whatever receivers ask for. Counted, so that no machine is too slow."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.planner.conftest import Clock, Fleet, seed
from vllm_rfork.planner.app import PlannerProcess
from vllm_rfork.planner.http.auth import Tokens
from vllm_rfork.planner.http.operating_calls import MAX_SNAPSHOTS
from vllm_rfork.planner.http.streamed import json_chunks
from vllm_rfork.planner.policy import policy_named
from vllm_rfork.planner.settings import Settings
from vllm_rfork.planner.store.base import Announcement, Granted, Queued, Rules
from vllm_rfork.planner.store.errors import StillLeased
from vllm_rfork.planner.store.grants import STALE_BATCH
from vllm_rfork.planner.store.memory import SLICE, MemoryStore

EXCLUDED = 256  # as many as a header may name


class Exclusions(frozenset[str]):
    """Seeds that a receiver excludes; counts how often somebody looks."""

    looked = 0

    def __contains__(self, name: object) -> bool:
        Exclusions.looked += 1
        return super().__contains__(name)


@contextlib.contextmanager
def at_most(looks: int) -> Iterator[None]:
    Exclusions.looked = 0
    yield
    assert Exclusions.looked <= looks


@pytest.fixture
def fleet() -> Fleet:
    clock = Clock()
    return Fleet(MemoryStore(Rules(policy=policy_named("least-loaded")), clock), clock)


async def test_a_seed_with_many_slots_passes_through_the_line_once(fleet: Fleet) -> None:
    for _ in range(500):
        await fleet.ask(wait_s=60, exclude=Exclusions({str(seed(1))}))
    suited = [await fleet.ask(wait_s=60, exclude=Exclusions({str(seed(2))})) for _ in range(70)]
    with at_most(600):
        await fleet.announce(1, slots=64)
    with at_most(600):
        await fleet.announce(1, slots=64)
    assert len(fleet.settled) == 64
    assert fleet.settled == [each.ticket for each in suited[:64] if isinstance(each, Queued)]


async def test_a_seed_that_goes_does_not_make_every_exclusion_of_every_waiting_receiver_be_looked_at(
    fleet: Fleet,
) -> None:
    everybody = Exclusions(str(seed(number)) for number in range(EXCLUDED))
    for number in range(EXCLUDED):
        await fleet.announce(number)
    assert isinstance(await fleet.ask(), Granted)
    await fleet.store.intend("k", "loader", "", 600)
    waiting = 400
    for number in range(waiting):
        assert isinstance(await fleet.ask(wait_s=60, intent=f"i{number}", exclude=everybody), Queued)
    with at_most(3 * waiting):
        for number in range(EXCLUDED):
            with contextlib.suppress(StillLeased):
                await fleet.store.withdraw("k", seed(number))
                break
    with at_most(3 * waiting):
        await fleet.store.intend("k", "loader", "", 0)
    assert len(fleet.settled) == 1, "one of them loads, the others wait for it"


async def test_many_seeds_that_go_stale_at_once_are_dropped_in_turns_and_not_granted_meanwhile(fleet: Fleet) -> None:
    """As a planner finds them that was paused for longer than ``stale_s``."""
    count = 4 * STALE_BATCH
    for number in range(count):
        await fleet.announce(number, key="stale")
    fleet.clock.pass_(61)
    left = [each.seeds for each in (await fleet.store.totals()).values()]
    assert left == [3 * STALE_BATCH]
    await fleet.announce(count - 1, key="stale")  # one that lives after all
    granted = await fleet.ask(key="stale")
    assert isinstance(granted, Granted)
    assert granted.seed == seed(count - 1), "all that were announced before it are stale, though not dropped yet"
    while await fleet.store.sweep() == 0:
        assert fleet.kinds().count("seed_dropped") < count
    assert fleet.kinds().count("seed_dropped") == count - 1
    assert (await fleet.store.totals())["stale"].seeds == 1


# --- snapshots -------------------------------------------------------------------------------------------------------


async def test_others_have_their_turn_while_a_large_snapshot_is_made(fleet: Fleet) -> None:
    for number in range(6 * SLICE):
        await fleet.announce(number, key=f"k{number % 3}")
    turns, over = 0, False

    async def other() -> None:
        nonlocal turns
        while not over:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    sizes = [len(value) async for name, value in fleet.store.snapshot_slices(limit=10_000) if name == "seeds"]
    over = True
    await task
    assert (max(sizes), sum(sizes)) == (SLICE, 6 * SLICE)
    assert turns >= 6


async def test_a_snapshot_shows_what_there_was_when_it_began(fleet: Fleet) -> None:
    for number in range(2 * SLICE):
        await fleet.announce(number)
    shown = []
    async for name, value in fleet.store.snapshot_slices(limit=10_000):
        if name == "seeds" and value:
            shown += [each["seed"] for each in value]
            for number in (SLICE, SLICE + 1):
                with contextlib.suppress(Exception):
                    await fleet.store.withdraw("k", seed(number))
            await fleet.announce(5 * SLICE)
    assert shown == [str(seed(number)) for number in range(2 * SLICE)]


async def test_an_answer_in_chunks_is_the_json_of_the_whole() -> None:
    parts: list[tuple[str, object]] = [
        ("text", "a\udcff"),
        ("number", 1.5),
        ("none", []),
        ("list", []),
        ("list", [1, "x"]),
        ("list", []),
        ("list", [{"y": [2]}]),
        ("keys", {}),
        ("keys", {"a": 1, "b": {}}),
        ("keys", {"c": []}),
        ("last", {}),
    ]

    async def given() -> AsyncIterator[tuple[str, object]]:
        for part in parts:
            yield part

    text = b"".join([chunk async for chunk in json_chunks(given())])
    assert json.loads(text) == {
        "text": "a\\udcff",
        "number": 1.5,
        "none": [],
        "list": [1, "x", {"y": [2]}],
        "keys": {"a": 1, "b": {}, "c": []},
        "last": {},
    }


async def test_a_large_snapshot_is_answered_in_chunks_and_only_a_few_at_once() -> None:
    settings = Settings(port=0)
    async with (
        PlannerProcess(settings, tokens=Tokens(None, {})).running() as planner,
        aiohttp.ClientSession() as session,
    ):
        for number in range(3 * SLICE):
            await planner.store.announce(Announcement(key="k", seed=seed(number)))
        url = f"{planner.url}/debug/snapshot?limit=100000"
        async with session.get(url) as answer:
            assert answer.headers.get("Content-Length") is None
            assert answer.content_type == "application/json"
            assert len((await answer.json())["seeds"]) == 3 * SLICE
        async with session.head(url) as answer:
            assert (answer.status, await answer.read()) == (200, b"")
        planner.api.operating.snapshots = MAX_SNAPSHOTS
        async with session.get(url) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "5")
        planner.api.operating.snapshots = 0
        answers = await asyncio.gather(*(session.get(url) for _ in range(MAX_SNAPSHOTS)))
        assert all([len(await each.read()) > 1000 for each in answers])
        assert planner.api.operating.snapshots == 0
