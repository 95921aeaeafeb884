"""Planner processes that are started, killed and stopped, over memory and over a real Redis."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.planner.processes import PlannerUnderTest, call, until_status
from tests.planner.redis_server import RedisServer
from tests.planner.replicas import ADD, leader_of


@pytest.fixture
def started() -> Iterator[list[PlannerUnderTest]]:
    """Whoever is put in here is gone after the test."""
    processes: list[PlannerUnderTest] = []
    yield processes
    for each in processes:
        each.kill()


def start(started: list[PlannerUnderTest], *flags: str, port: int = 0, **environ: str) -> PlannerUnderTest:
    # One lease for each seed: these tests are about who has it.
    started.append(PlannerUnderTest("--slots", "1", *flags, port=port, **environ))
    return started[-1]


async def _until_waiting(session: aiohttp.ClientSession, url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        async with session.get(url + "/debug/snapshot") as answer:
            if answer.status == 200 and (await answer.json())["waiting"]:
                return
        assert time.monotonic() < deadline, "nobody waits"
        await asyncio.sleep(0.02)


async def _metrics(session: aiohttp.ClientSession, url: str) -> list[str]:
    async with session.get(url + "/metrics") as answer:
        assert answer.status == 200
        return (await answer.text()).splitlines()


async def test_a_standby_answers_503_and_takes_over_what_a_killed_leader_granted(
    redis_server: RedisServer, started: list[PlannerUnderTest]
) -> None:
    flags = ("--store", redis_server.url, "--redis-prefix", "standby", "--leader-ttl-sec", "3")
    replicas = [start(started, *flags).until_ready() for _ in range(2)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        leader = await leader_of(session, replicas)
        (standby,) = (each for each in replicas if each is not leader)
        add = {"SEED_KEY": "k", "SEED_PORT": "1", **ADD}
        calls = [
            ("POST", "/add_seed", add),
            ("GET", "/get_seed", {"SEED_KEY": "k"}),
            ("GET", "/get_seed", {"SEED_KEY": "k", "RFORK-WAIT-SEC": "60"}),
            ("POST", "/put_seed", {**ADD, "SEED_PORT": "1", "USER_ID": "u"}),
            ("POST", "/renew_seed_lease", {**ADD, "SEED_PORT": "1", "USER_ID": "u"}),
            ("POST", "/remove_seed", add),
            ("POST", "/rfork_intent", {"SEED_KEY": "k", "RFORK-INTENT": "i"}),
            ("GET", "/debug/snapshot", {}),
            ("GET", "/dashboard.json", {}),
            ("GET", "/readyz", {}),
        ]
        for method, path, headers in calls:
            status, answer = await asyncio.wait_for(call(session, method, standby.url + path, **headers), 30)
            assert (path, status, answer.get("Retry-After")) == (path, 503, "1")
        assert (await call(session, "GET", standby.url + "/healthz"))[0] == 200
        shown = {each: await _metrics(session, each.url) for each in replicas}
        assert "rfork_planner_store_up 0.0" in shown[standby]
        assert "rfork_planner_store_up 1.0" in shown[leader]
        assert [name for name in shown if any(line.startswith("rfork_planner_keys ") for line in shown[name])] == [
            leader
        ]
        assert (await call(session, "POST", leader.url + "/add_seed", **add))[0] == 200
        status, granted = await call(session, "GET", leader.url + "/get_seed", SEED_KEY="k")
        lease = {name: granted[name] for name in ("SEED_IP", "SEED_PORT", "SEED_RANK", "USER_ID")}
        waiting = asyncio.create_task(
            call(session, "GET", leader.url + "/get_seed", **{"SEED_KEY": "k", "RFORK-WAIT-SEC": "60"})
        )
        await _until_waiting(session, leader.url)
        leader.kill()
        assert (await waiting)[0] == 0
        await until_status(session, standby.url + "/readyz", 200)
        assert (await call(session, "GET", standby.url + "/get_seed", SEED_KEY="k"))[0] == 404, "the slot is taken"
        again = asyncio.create_task(
            call(session, "GET", standby.url + "/get_seed", **{"SEED_KEY": "k", "RFORK-WAIT-SEC": "60"})
        )
        await _until_waiting(session, standby.url)
        assert (await call(session, "POST", standby.url + "/put_seed", **lease))[0] == 200
        # The place in line that the dead leader had is not in the way.
        assert (await asyncio.wait_for(again, 30))[0] == 200


async def test_a_leader_that_is_stopped_hands_over_at_once(
    redis_server: RedisServer, started: list[PlannerUnderTest]
) -> None:
    flags = ("--store", redis_server.url, "--redis-prefix", "handover", "--leader-ttl-sec", "40")
    replicas = [start(started, *flags).until_ready() for _ in range(2)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        leader = await leader_of(session, replicas)
        (standby,) = (each for each in replicas if each is not leader)
        assert await asyncio.to_thread(leader.stop) == 0
        await until_status(session, standby.url + "/readyz", 200)  # does not wait for 40 s


async def test_without_redis_receivers_are_sent_to_storage_and_the_planner_recovers(
    tmp_path: Path, started: list[PlannerUnderTest]
) -> None:
    server = RedisServer(tmp_path, keeps_data=True)
    server.start()
    try:
        planner = start(started, "--store", server.url).until_ready()
        async with aiohttp.ClientSession() as session:
            add = {"SEED_KEY": "k", "SEED_PORT": "1", **ADD}
            assert (await call(session, "POST", planner.url + "/add_seed", **add))[0] == 200
            assert (await call(session, "GET", planner.url + "/get_seed", SEED_KEY="k"))[0] == 200
            server.kill()
            await until_status(session, planner.url + "/readyz", 503)
            assert (await call(session, "GET", planner.url + "/get_seed", SEED_KEY="k"))[0] == 503
            assert (await call(session, "GET", planner.url + "/healthz"))[0] == 200
            async with session.get(planner.url + "/metrics") as answer:
                assert (answer.status, "rfork_planner_store_up 0.0" in await answer.text()) == (200, True)
            server.start()
            await until_status(session, planner.url + "/readyz", 200)
            # What Redis wrote down still holds: the slot is taken.
            assert (await call(session, "GET", planner.url + "/get_seed", SEED_KEY="k"))[0] == 404
            assert (await call(session, "POST", planner.url + "/add_seed", **{**add, "SEED_PORT": "2"}))[0] == 200
            assert (await call(session, "GET", planner.url + "/get_seed", SEED_KEY="k"))[0] == 200
    finally:
        server.kill()


async def test_a_planner_that_lost_its_state_rebuilds_it_and_grants_nothing_unsafe(
    started: list[PlannerUnderTest],
) -> None:
    flags = ("--lease-ttl-sec", "4")
    planner = start(started, *flags).until_ready()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        add = {"SEED_KEY": "k", "SEED_PORT": "1", **ADD}
        status, answer = await call(session, "POST", planner.url + "/add_seed", **add)
        assert status == 200
        state = {"RFORK-STATE": answer["RFORK-STATE"]}
        status, lease = await call(session, "GET", planner.url + "/get_seed", SEED_KEY="k")
        held = {name: lease[name] for name in ("SEED_IP", "SEED_PORT", "SEED_RANK", "USER_ID")}
        planner.kill()
        planner = start(started, *flags, port=planner.port).until_ready()
        # The heartbeat brings the seed back; the receiver that reads from it renews, and keeps its slot.
        assert (await call(session, "POST", planner.url + "/add_seed", **add, **state))[0] == 200
        assert (await call(session, "GET", planner.url + "/get_seed", SEED_KEY="k"))[0] == 404
        assert (await call(session, "POST", planner.url + "/renew_seed_lease", **held))[0] == 200
        async with session.get(planner.url + "/debug/snapshot") as answer_:
            assert [each["leases"] for each in (await answer_.json())["seeds"]] == [1]
        assert (await call(session, "POST", planner.url + "/put_seed", **held))[0] == 200
        # Others of the forgotten leases may still live, until one TTL has passed; then a waiting receiver is served.
        assert (await call(session, "GET", planner.url + "/get_seed", SEED_KEY="k"))[0] == 404
        wait = {"SEED_KEY": "k", "RFORK-WAIT-SEC": "30"}
        assert (await asyncio.wait_for(call(session, "GET", planner.url + "/get_seed", **wait), 30))[0] == 200


async def test_sigterm_drains_and_ends_with_status_zero(started: list[PlannerUnderTest]) -> None:
    planner = start(started, "--log-format", "json").until_ready()
    async with aiohttp.ClientSession() as session:
        wait = {"SEED_KEY": "k", "RFORK-WAIT-SEC": "60"}
        waiting = asyncio.create_task(call(session, "GET", planner.url + "/get_seed", **wait))
        while True:
            async with session.get(planner.url + "/debug/snapshot") as answer:
                if (await answer.json())["waiting"]:
                    break
        assert await asyncio.to_thread(planner.stop) == 0
        assert (await asyncio.wait_for(waiting, 30))[0] == 503
    assert {"at", "level", "logger", "message"} <= set(json.loads(planner.log[-1]))


@pytest.mark.parametrize(
    ("flags", "environ", "named"),
    [
        (("--slots", "none"), {}, "slots"),
        (("--policy", "cheapest"), {}, "policy"),
        (("--tls-cert", "x.pem"), {}, "tls_cert"),
        (("--store", "postgres://x"), {}, "store"),
        (("--token-file", "/nowhere/token"), {}, "token_file"),
        ((), {"RFORK_PLANNER_SLOT": "3"}, "RFORK_PLANNER_SLOT"),
        ((), {"RFORK_PLANNER_LEASE_TTL_SEC": "-3"}, "lease_ttl_sec"),
        ((), {"RFORK_TOKEN": ""}, "RFORK_TOKEN"),
        ((), {"RFORK_TOKEN": " \n"}, "RFORK_TOKEN"),
        (("--store", "redis://:s3cret@h/0?foo=bar"), {}, "foo"),
    ],
)
def test_a_wrong_setting_fails_the_start_and_is_named(
    started: list[PlannerUnderTest], flags: tuple[str, ...], environ: dict[str, str], named: str
) -> None:
    status, said = start(started, *flags, **environ).fails()
    assert status == 2
    assert named in said
    assert "Traceback" not in said
    assert "s3cret" not in said


def test_a_wait_that_workers_do_not_sit_out_is_warned_of(started: list[PlannerUnderTest]) -> None:
    process = start(started, "--seed-wait-sec", "30").until_ready()
    assert process.stop() == 0
    assert any("rfork_seed_wait_sec" in line for line in process.log)


def test_a_taken_port_or_a_missing_redis_fails_the_start_in_one_line(started: list[PlannerUnderTest]) -> None:
    first = start(started).until_ready()
    status, said = start(started, port=first.port).fails()
    assert (status, "could not start" in said, "Traceback" in said) == (1, True, False)
    status, said = start(started, "--store", "redis://127.0.0.1:1/0", "--store-wait-sec", "0.2").fails()
    assert (status, "could not start" in said, "Traceback" in said) == (1, True, False)
