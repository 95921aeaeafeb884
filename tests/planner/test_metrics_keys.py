"""The series by key, with model and strategy, and those by engine: they begin at 0 and their number is bounded."""

from __future__ import annotations

import pytest

from tests.planner.test_api import planner
from tests.planner.test_metrics_store import values
from vllm_rfork.messages import MISSES, encode_text
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.store.base import Outcome, Released, Totals
from vllm_rfork.planner.store.key_use import UNNAMED, KeyNames

NAMES = {"RFORK-MODEL": "/models/q", "RFORK-STRATEGY": "prod"}
LABELS = 'key="k",model="/models/q",strategy="prod"'


async def test_series_by_key_name_model_and_strategy() -> None:
    async with planner() as client:
        await client.status("GET", "/get_seed", SEED_KEY="k", **NAMES)
        await client.add()
        await client.lease()
        found = await values(client)
    for name in ("slots", "leases", "waiting", "oldest_wait_seconds", "intents", "grants_total", "saved_seconds_total"):
        assert f"{name}{{{LABELS}}}" in found
    assert found['seeds{key="k",model="/models/q",state="serving",strategy="prod"}'] == 1
    assert found[f"grants_total{{{LABELS}}}"] == 1
    misses = {name: value for name, value in found.items() if name.startswith("misses_total")}
    label = 'misses_total{{key="k",model="/models/q",reason="{}",strategy="prod"}}'
    assert misses == {label.format(reason): float(reason == "none") for reason in MISSES}


async def test_a_key_whose_names_become_known_later_has_one_series() -> None:
    """Older workers do not send them: their counts must not stay behind in a series of their own."""
    async with planner() as client:
        await client.add()
        await client.lease()
        assert 'grants_total{key="k",model="",strategy=""}' in await values(client)
        await client.add(**NAMES)
        found = await values(client)
    assert [name for name in found if name.startswith("grants_total")] == [f"grants_total{{{LABELS}}}"]
    assert found[f"grants_total{{{LABELS}}}"] == 1


def test_a_replica_that_leads_no_longer_keeps_its_series() -> None:
    metrics = Metrics(10)
    metrics.granted("k", None)
    names = KeyNames("/models/q", "prod")
    led = metrics.page({"k": Totals(seeds=1)}, lambda _: names).decode()
    stands_by = metrics.page(None, lambda _: UNNAMED).decode()
    for page in (led, stands_by):
        assert f"rfork_planner_grants_total{{{LABELS}}} 1.0" in page
    assert ("rfork_planner_seeds{" in led, "rfork_planner_seeds{" in stands_by) == (True, False)


async def test_model_names_add_no_series_beyond_those_of_the_keys() -> None:
    async with planner(max_metric_keys=2) as client:
        for number in range(6):
            await client.add(5000 + number, SEED_KEY=f"key{number}", **{"RFORK-MODEL": f"model{number}"})
        for number in range(6):  # one key with ever new names
            await client.add(5000, SEED_KEY="key0", **{"RFORK-MODEL": f"other{number}"})
        found = await values(client)
        serving = {name: value for name, value in found.items() if name.startswith("seeds{") and "serving" in name}
    assert serving == {
        'seeds{key="key0",model="other5",state="serving",strategy=""}': 1,
        'seeds{key="key1",model="model1",state="serving",strategy=""}': 1,
        'seeds{key="(other)",model="",state="serving",strategy=""}': 4,
    }


async def test_names_that_are_not_text_leave_the_page_readable() -> None:
    async with planner() as client:
        await client.add(**{"RFORK-MODEL": encode_text("\udcff\udcfe\n")})
        assert 'seeds{key="k",model="??\\n",state="serving",strategy=""}' in await values(client)


def test_forks_are_measured_by_engine() -> None:
    metrics = Metrics(10)
    for outcome in (
        Outcome(True, nbytes=20_000_000_000, duration_s=2.0, lane="nixl/rdma"),
        Outcome(True, nbytes=1_000_000_000, lane="nixl/rdma"),
        Outcome(False, nbytes=9, duration_s=1.0, lane="nixl/tcp", cause="EngineError"),
        Outcome(True, nbytes=10, duration_s=1.0, lane="made up"),
        None,
    ):
        metrics.released(Released("k", 3.0, saved_s=0.5), outcome)
    page = metrics.page({}).decode()
    assert 'rfork_planner_fork_seconds_count{engine="nixl"} 2.0' in page
    assert 'rfork_planner_fork_bytes_per_second_count{engine="nixl"} 1.0' in page, "the failed one is not a rate"
    assert 'rfork_planner_fork_bytes_per_second_sum{engine="nixl"} 1e+10' in page
    assert 'rfork_planner_fork_bytes_per_second_bucket{engine="nixl",le="1e+10"} 1.0' in page
    assert 'rfork_planner_fork_bytes_per_second_bucket{engine="nixl",le="5e+09"} 0.0' in page
    assert 'rfork_planner_fork_seconds_count{engine="(other)"} 1.0' in page
    assert 'rfork_planner_saved_seconds_total{key="k",model="",strategy=""} 2.5' in page


@pytest.mark.parametrize(
    "series",
    [
        *(f'forks_total{{result="{each}"}}' for each in ("ok", "failed", "released")),
        *(f'seeds_dropped_total{{reason="{each}"}}' for each in ("stale", "withdrawn", "new epoch", "(other)")),
        *(f'store_errors_total{{reason="{each}"}}' for each in ("unreachable", "not_leader", "fenced")),
        *(f'events_total{{kind="{each}"}}' for each in ("lease_expired", "seed_aside", "state_lost")),
    ],
)
def test_counters_begin_at_zero(series: str) -> None:
    assert f"rfork_planner_{series} 0.0" in Metrics(10).page({}).decode().splitlines()


def test_no_series_has_the_time_of_its_creation() -> None:
    assert "_created" not in Metrics(10).page({}).decode()
