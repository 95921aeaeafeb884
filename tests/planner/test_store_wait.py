"""A planner that is started before its store: it answers probes and metrics, and waits."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest

from tests.planner.redis_server import RedisServer
from tests.planner.test_api import ADD, SEED, Client, eventually, planner
from vllm_rfork.planner.policy import policy_named
from vllm_rfork.planner.store.base import Rules
from vllm_rfork.planner.store.errors import StoreUnavailable
from vllm_rfork.planner.store.memory import MemoryStore
from vllm_rfork.planner.store_opening import LONGEST_PAUSE_S, StoreOpening

NOWHERE = "redis://127.0.0.1:1/0"


async def _until_ready(client: Client) -> None:
    while await client.status("GET", "/readyz") != 200:
        await asyncio.sleep(0.02)


async def test_the_planner_waits_for_redis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(tmp_path)
    try:
        async with planner(store=server.url) as client:
            assert await client.status("GET", "/healthz") == 200
            status, _, page = await client.call("GET", "/metrics")
            assert (status, "rfork_planner_store_up 0.0" in page.splitlines()) == (200, True)
            for method, path, headers in (
                ("POST", "/add_seed", ADD),
                ("GET", "/get_seed", {"SEED_KEY": "k"}),
                ("POST", "/put_seed", {**SEED, "USER_ID": "u"}),
                ("GET", "/debug/snapshot", {}),
                ("GET", "/dashboard.json", {}),
                ("GET", "/readyz", {}),
            ):
                answer = await client.call(method, path, **headers)
                assert (path, answer[0], answer[1].get("Retry-After")) == (path, 503, "1")
                assert "Redis is not reachable" in answer[2]
            server.start()
            await asyncio.wait_for(_until_ready(client), 20)
            assert await client.add() == 200
            assert "rfork_planner_store_up 1.0" in (await client.call("GET", "/metrics"))[2].splitlines()
    finally:
        server.kill()
    waits = [each for each in caplog.records if "waits for its store" in each.getMessage()]
    assert [each.levelno for each in waits] == [logging.WARNING]


async def test_the_wait_for_a_store_is_bounded_if_that_is_wanted() -> None:
    async with planner(store=NOWHERE, store_wait_sec=0.3) as client:
        client.planner.opening.check()
        await asyncio.wait_for(client.planner.stop.wait(), 20)
        with pytest.raises(StoreUnavailable, match="Redis is not reachable"):
            client.planner.opening.check()


async def test_a_planner_that_waits_for_its_store_can_be_stopped() -> None:
    async with planner(store=NOWHERE) as client:
        assert json.loads((await client.call("GET", "/healthz"))[2]) == {"status": "ok"}
    client.planner.opening.check()  # nothing has failed


class _Late(MemoryStore):
    """A store that is available from the attempt with this number on."""

    def __init__(self, attempt: int) -> None:
        super().__init__(Rules(policy=policy_named("least-loaded")))
        self.left = attempt

    async def open(self) -> None:
        self.left -= 1
        if self.left:
            raise StoreUnavailable(f"{self.left} attempts left")


class _Silent(MemoryStore):
    """A store that does not answer until ``answers`` is set."""

    def __init__(self) -> None:
        super().__init__(Rules(policy=policy_named("least-loaded")))
        self.answers = asyncio.Event()
        self.opened = False

    async def open(self) -> None:
        await self.answers.wait()
        self.opened = True


@pytest.mark.parametrize("answers", [True, False])
async def test_a_silent_store_does_not_keep_the_planner_from_listening(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_rfork.planner.store_opening.FIRST_ATTEMPT_S", 0.01)
    store = _Silent()
    opening = StoreOpening(store, 0.0, lambda: None)
    await asyncio.wait_for(opening.begin(), 20)
    assert not store.opened
    if answers:
        store.answers.set()
        await eventually(lambda: store.opened)
    await asyncio.wait_for(opening.close(), 20)
    opening.check()


async def test_pauses_between_attempts_grow_up_to_a_bound() -> None:
    pauses: list[float] = []

    async def sleep(pause_s: float) -> None:
        pauses.append(pause_s)

    store = _Late(12)
    opening = StoreOpening(store, 0.0, lambda: None, sleep)
    await opening.begin()
    await eventually(lambda: not store.left)
    await opening.close()
    assert pauses == sorted(pauses)
    assert (pauses[0], max(pauses), len(pauses)) == (0.1, LONGEST_PAUSE_S, 11)
    assert LONGEST_PAUSE_S < 5, "a planner serves within five seconds of its store's start"
