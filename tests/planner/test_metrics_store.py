"""The store in the planner's metrics: times, declined calls, the leader; and the process."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.planner.redis_server import RedisServer
from tests.planner.test_api import Client, planner
from vllm_rfork import __version__
from vllm_rfork.planner.policy import policy_named
from vllm_rfork.planner.store.base import Rules, Store
from vllm_rfork.planner.store.errors import FENCED, StoreUnavailable
from vllm_rfork.planner.store.memory import MemoryStore
from vllm_rfork.planner.store.timed import TimedStore


async def values(client: Client) -> dict[str, float]:
    """The value of each series on the page, without the prefix."""
    status, _, page = await client.call("GET", "/metrics")
    assert status == 200
    return {name: float(value) for name, value in re.findall(r"^(?:rfork_planner_)?(\w\S*) (\S+)$", page, re.MULTILINE)}


async def test_calls_of_the_store_are_measured() -> None:
    async with planner() as client:
        await client.add()
        await client.add()
        await client.lease()
        found = await values(client)
    assert found['store_seconds_count{operation="announce"}'] == 2
    assert found['store_seconds_count{operation="acquire"}'] == 1
    assert 0 < found['store_seconds_sum{operation="announce"}'] < 60
    assert found["leader"] == 1
    assert found[f'build_info{{version="{__version__}"}}'] == 1
    assert found["process_resident_memory_bytes"] > 1e6


async def test_declined_calls_are_counted_by_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async def taken_over(*_: object) -> None:
        raise StoreUnavailable("another replica leads", FENCED)

    async with planner() as client:
        assert (await values(client))['store_errors_total{reason="fenced"}'] == 0
        monkeypatch.setattr(client.planner.store, "announce", taken_over)
        assert await client.add() == 503
        found = await values(client)
    assert found['store_errors_total{reason="fenced"}'] == 1
    assert found['store_errors_total{reason="unreachable"}'] == found['store_errors_total{reason="not_leader"}'] == 0
    assert found['store_seconds_count{operation="announce"}'] == 1


async def test_metrics_answer_while_redis_is_down(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, keeps_data=True)
    server.start()
    try:
        async with planner(store=server.url) as client, planner(store=server.url) as standby:
            await client.add()
            assert (await values(client))["leader"] == 1
            found = await values(standby)
            assert (found["leader"], found['store_errors_total{reason="unreachable"}']) == (0, 0)
            assert found['store_errors_total{reason="not_leader"}'] > 0
            server.kill()
            while await client.status("GET", "/readyz") == 200:
                await asyncio.sleep(0.02)
            found = await values(client)
            assert (found["leader"], found["store_up"], "keys" in found) == (0, 0, False)
            assert found['store_errors_total{reason="unreachable"}'] > 0
            assert found['requests_total{call="/add_seed",code="200"}'] == 1
    finally:
        server.kill()


class _Recorder:
    """Answers every call with its name and arguments."""

    rules = Rules(policy=policy_named("least-loaded"))

    def __getattr__(self, name: str) -> Any:
        async def call(*args: object, **named: object) -> object:
            return name, args, named

        return call


class _Meter:
    def __init__(self) -> None:
        self.operations: list[str] = []

    def measured(self, operation: str, duration_s: float) -> None:
        assert duration_s >= 0
        self.operations.append(operation)

    def unavailable(self, reason: str) -> None:
        raise AssertionError(reason)


CALLS = sorted(Store.__abstractmethods__ - {"open", "close", "snapshot_slices", "names_of"})


@pytest.mark.parametrize("name", CALLS)
async def test_every_call_reaches_the_store_as_it_is(name: str) -> None:
    meter = _Meter()
    timed = TimedStore(_Recorder(), meter)  # type: ignore[arg-type]
    parameters = inspect.signature(getattr(Store, name)).parameters.values()
    args = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "self"]
    named = {each.name: each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    answer = await getattr(timed, name)(*args, **named)
    assert answer in ((name, tuple(args), named), None)
    returns = inspect.signature(getattr(Store, name)).return_annotation
    assert (answer is None) == (returns == "None")
    assert meter.operations == [name]


async def test_callbacks_reach_the_store_when_it_is_opened() -> None:
    store = MemoryStore(_Recorder.rules)
    timed = TimedStore(store, _Meter())
    timed.notify, timed.observe, timed.lost = [].append, [].append, lambda: None
    await timed.open()
    for name in ("notify", "notify_all", "lost", "observe", "lease_ids"):
        assert getattr(store, name) == getattr(timed, name), name
