"""The planner client and this project's planner, as processes that meet over HTTP, with all that both can do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.planner.processes import PlannerUnderTest
from vllm_rfork.clients import LeaseKeeper, Outcome, PlannerClient
from vllm_rfork.errors import NoSeedAvailable, PlannerError
from vllm_rfork.messages import SeedAddress

KEY = "/models/café$prod$kv_both$0$0"
SEED = SeedAddress("10.0.0.1", 8080, 0)
OTHER = SeedAddress("10.0.0.2", 8080, 0)


@pytest.fixture
def url() -> Iterator[str]:
    planner = PlannerUnderTest("--trust-announced-address", RFORK_TOKEN="a-token-for-tests").until_ready()
    yield planner.url
    planner.stop()


async def test_everything_both_know_works_together(url: str) -> None:
    client = PlannerClient(url, token="a-token-for-tests")
    assert (await client.healthz())["status"] == "ok"
    with pytest.raises(NoSeedAvailable) as miss:
        await client.acquire(KEY, fingerprint="f", intent="first")
    assert miss.value.intent_granted
    assert await client.intend(KEY, "first", ttl_s=60, fingerprint="f") is Outcome.DONE

    # A receiver that may wait is served by the seed that was intended.
    waiting = asyncio.create_task(client.acquire(KEY, fingerprint="f", wait_s=30, intent="second", labels="host=a"))
    await client.announce(KEY, SEED, fingerprint="f", slots=1, labels="host=a,rack=b", epoch="e1", intent="first")
    lease = await waiting
    assert lease.seed == SEED
    assert lease.ttl_s is not None

    # Another fingerprint is not paired, and a seed that failed is not given again.
    await client.announce(KEY, OTHER, fingerprint="other", epoch="e2")
    with pytest.raises(NoSeedAvailable):
        await client.acquire(KEY, fingerprint="f")
    with pytest.raises(NoSeedAvailable):
        await client.acquire(KEY, fingerprint="other", exclude=[OTHER])

    assert await client.renews_leases()
    assert await client.renew(lease) is Outcome.DONE
    keeper = LeaseKeeper(client, lease)
    await keeper.start()
    keeper.check()
    await keeper.stop()
    assert await client.withdraw(KEY, SEED) is Outcome.DRAINING
    outcome = await client.release(lease, result="failed", nbytes=5, seconds=0.5, cause="SeedError")
    assert outcome is Outcome.DONE
    assert await client.release(lease) is Outcome.UNKNOWN
    assert await client.renew(lease) is Outcome.UNKNOWN
    assert await client.withdraw(KEY, SEED) is Outcome.UNKNOWN
    assert [seed["seed"] for seed in (await client.snapshot())["seeds"]] == [str(OTHER)]


async def test_without_the_token_nobody_is_let_in(url: str) -> None:
    with pytest.raises(PlannerError, match="401"):
        await PlannerClient(url).announce(KEY, SEED)
