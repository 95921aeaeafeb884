"""The example planner implements the protocol; tested by plain HTTP, without this project's clients."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from tests.unit.interop_planners import MOCK_PLANNER, free_port, load_mock_planner, serve
from tests.unit.virtual_time import VirtualTime, until

mock = load_mock_planner()

SEED = {"SEED_IP": "10.0.0.1", "SEED_PORT": "8080", "SEED_RANK": "0"}
OTHER = {**SEED, "SEED_RANK": "1"}


class Calls:
    """Every call, as (status, headers, text)."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def __call__(
        self, method: str, path: str, *parts: dict[str, str], **headers: str
    ) -> tuple[int, dict[str, str], str]:
        sent = {name: value for part in parts for name, value in part.items()} | headers
        async with self._session.request(method, self._url + path, headers=sent) as answer:
            return answer.status, {name.upper(): value for name, value in answer.headers.items()}, await answer.text()

    async def add(self, *parts: dict[str, str], key: str = "k") -> int:
        return (await self("POST", "/add_seed", SEED, *parts, SEED_KEY=key, SEED_REFCNT="0"))[0]

    async def get(self, key: str = "k") -> dict[str, str] | None:
        status, headers, _ = await self("GET", "/get_seed", SEED_KEY=key)
        assert status in (200, 404)
        if status == 404:
            return None
        names = ("SEED_IP", "SEED_PORT", "SEED_RANK", "USER_ID", "LEASE_TTL_SEC")
        return {name: headers[name] for name in names if name in headers}

    async def lease(self, call: str, lease: dict[str, str]) -> int:
        return (await self("POST", call, lease))[0]

    async def remove(self, *parts: dict[str, str], key: str = "k") -> int:
        return (await self("POST", "/remove_seed", SEED, *parts, SEED_KEY=key))[0]


@contextlib.asynccontextmanager
async def planner(**settings: float) -> AsyncIterator[tuple[Calls, VirtualTime]]:
    virtual = VirtualTime()
    book = mock.Planner(clock=virtual.clock, **{"slots": 1, **settings})
    async with (
        serve(mock.make_app(book)) as url,
        aiohttp.ClientSession() as session,
    ):
        yield Calls(session, url), virtual


async def test_a_lease_goes_round() -> None:
    async with planner() as (calls, _):
        assert await calls.get() is None
        assert await calls.add() == 200
        lease = await calls.get()
        assert lease is not None
        assert {**SEED, "USER_ID": lease["USER_ID"], "LEASE_TTL_SEC": "60"} == lease
        assert await calls.get() is None
        assert await calls.get("another key") is None
        assert await calls.lease("/put_seed", lease) == 200
        assert await calls.lease("/put_seed", lease) == 404
        again = await calls.get()
        assert again is not None
        assert again["USER_ID"] != lease["USER_ID"]


async def test_a_seed_carries_as_many_leases_as_it_has_slots() -> None:
    async with planner(slots=3) as (calls, _):
        await calls.add()
        leases = [await calls.get() for _ in range(4)]
        assert [lease is not None for lease in leases] == [True, True, True, False]


def test_a_seed_carries_four_leases_unless_it_is_told_otherwise() -> None:
    book = mock.Planner()
    book.add(("10.0.0.1", 8080, 0), "k")
    assert [book.get("k") is not None for _ in range(5)] == [True] * 4 + [False]


async def test_leases_spread_over_seeds_before_they_share_one() -> None:
    async with planner(slots=2) as (calls, _):
        await calls.add()
        await calls.add(OTHER)
        leases = [await calls.get() for _ in range(4)]
        assert sorted(lease["SEED_RANK"] for lease in leases[:2] if lease) == ["0", "1"]
        assert sorted(lease["SEED_RANK"] for lease in leases if lease) == ["0", "0", "1", "1"]


async def test_an_unrenewed_lease_ends_by_itself_and_a_renewed_one_lives() -> None:
    async with planner(lease_ttl_s=60) as (calls, virtual):
        await calls.add()
        lease = await calls.get()
        assert lease is not None
        for _ in range(3):
            virtual.now_s += 40
            await calls.add()
            assert await calls.lease("/renew_seed_lease", lease) == 200
        virtual.now_s += 59
        await calls.add()
        assert await calls.get() is None
        virtual.now_s += 2
        assert await calls.lease("/renew_seed_lease", lease) == 404
        assert await calls.lease("/put_seed", lease) == 404
        assert await calls.get() is not None


async def test_without_a_ttl_it_is_a_planner_of_the_old_kind() -> None:
    async with planner(lease_ttl_s=0) as (calls, virtual):
        await calls.add()
        lease = await calls.get()
        assert lease is not None
        assert "LEASE_TTL_SEC" not in lease
        for _ in range(100):
            virtual.now_s += 50
            await calls.add()
        assert await calls.get() is None


async def test_a_seed_unseen_for_a_minute_is_gone_with_its_leases() -> None:
    async with planner(lease_ttl_s=1000) as (calls, virtual):
        await calls.add()
        virtual.now_s += 59
        lease = await calls.get()
        assert lease is not None
        virtual.now_s += 2
        assert await calls.lease("/renew_seed_lease", lease) == 404
        assert await calls.remove() == 404
        await calls.add()
        assert await calls.get() is not None


async def test_announcing_another_key_rekeys_the_seed() -> None:
    async with planner() as (calls, _):
        await calls.add()
        await calls.add(key="new")
        assert await calls.get() is None
        lease = await calls.get("new")
        assert lease is not None
        # The lease stands for the seed, not for the key.
        await calls.add(key="newer")
        assert await calls.get("newer") is None
        assert await calls.lease("/put_seed", lease) == 200
        assert await calls.get("newer") is not None


async def test_a_withdrawn_seed_is_gone_at_once() -> None:
    async with planner() as (calls, _):
        await calls.add()
        assert await calls.remove(key="not its key") == 404
        assert await calls.remove(OTHER) == 404
        assert await calls.remove() == 200
        assert await calls.get() is None
        assert await calls.remove() == 404


async def test_a_seed_that_is_read_drains_and_goes_with_its_last_lease() -> None:
    async with planner(slots=2) as (calls, _):
        await calls.add()
        leases = [await calls.get(), await calls.get()]
        assert await calls.lease("/put_seed", leases[0] or {}) == 200
        assert await calls.remove() == 409
        assert await calls.get() is None
        assert await calls.lease("/renew_seed_lease", leases[1] or {}) == 200
        assert await calls.lease("/put_seed", leases[1] or {}) == 200
        assert await calls.remove() == 404


async def test_a_draining_seed_also_goes_when_its_last_lease_expires() -> None:
    async with planner(lease_ttl_s=30) as (calls, virtual):
        await calls.add()
        await calls.get()
        assert await calls.remove() == 409
        virtual.now_s += 31
        assert await calls.remove() == 404


async def test_a_draining_seed_gets_no_lease_from_a_late_heartbeat_and_is_back_once_it_has_drained() -> None:
    async with planner(slots=2) as (calls, _):
        await calls.add()
        lease = await calls.get()
        assert await calls.remove() == 409
        await calls.add()  # a beat that was on its way when the seed withdrew
        assert await calls.get() is None
        assert await calls.lease("/put_seed", lease or {}) == 200
        await calls.add()
        assert await calls.get() is not None


@pytest.mark.parametrize("spelling", [lambda name: name, lambda name: name.replace("_", "-"), str.lower])
async def test_names_are_read_in_every_spelling(spelling) -> None:  # type: ignore[no-untyped-def]
    def spelled(headers: dict[str, str]) -> dict[str, str]:
        return {spelling(name): value for name, value in headers.items()}

    async with planner() as (calls, _):
        assert (await calls("POST", "/add_seed", spelled({**SEED, "SEED_KEY": "k", "SEED_REFCNT": "0"})))[0] == 200
        status, lease, _ = await calls("GET", "/get_seed", spelled({"SEED_KEY": "k"}))
        assert status == 200
        for call in ("/renew_seed_lease", "/put_seed"):
            assert (await calls("POST", call, spelled({**SEED, "USER_ID": lease["USER_ID"]})))[0] == 200
        assert (await calls("POST", "/remove_seed", spelled({**SEED, "SEED_KEY": "k"})))[0] == 200


FULL = {**SEED, "SEED_KEY": "k", "SEED_REFCNT": "0", "USER_ID": "u"}
NEEDED = {
    ("POST", "/add_seed"): ["SEED_KEY", "SEED_IP", "SEED_PORT"],
    ("GET", "/get_seed"): ["SEED_KEY"],
    ("POST", "/put_seed"): ["SEED_IP", "SEED_PORT", "USER_ID"],
    ("POST", "/renew_seed_lease"): ["SEED_IP", "SEED_PORT", "USER_ID"],
    ("POST", "/remove_seed"): ["SEED_KEY", "SEED_IP", "SEED_PORT"],
}


async def test_rank_and_reference_count_may_be_missing_from_every_call() -> None:
    """As vLLM-Ascend's clients after 0.30.0rc2 may send them; a missing rank is 0."""
    named = {name: value for name, value in SEED.items() if name != "SEED_RANK"}
    async with planner() as (calls, _):
        assert (await calls("POST", "/add_seed", named, SEED_KEY="k"))[0] == 200
        lease = await calls.get()
        assert lease is not None
        assert lease["SEED_RANK"] == "0"
        for call, status in (("/renew_seed_lease", 200), ("/put_seed", 200), ("/put_seed", 404)):
            assert await calls.lease(call, {**named, "USER_ID": lease["USER_ID"]}) == status
        assert (await calls("POST", "/remove_seed", named, SEED_KEY="k"))[0] == 200


async def test_a_lease_on_a_seed_with_a_rank_ends_by_a_receiver_that_states_none() -> None:
    named = {name: value for name, value in SEED.items() if name != "SEED_RANK"}
    async with planner() as (calls, _):
        await calls.add({"SEED_RANK": "3"})
        lease = await calls.get()
        assert lease is not None
        assert lease["SEED_RANK"] == "3"
        held = {**named, "USER_ID": lease["USER_ID"]}
        assert await calls.lease("/renew_seed_lease", held) == 200
        assert await calls.lease("/put_seed", held) == 200
        assert await calls.get() is not None


@pytest.mark.parametrize(
    ("method", "path", "name"), [(*call, name) for call, names in NEEDED.items() for name in names]
)
async def test_a_missing_header_is_a_400_that_names_it(method: str, path: str, name: str) -> None:
    async with planner() as (calls, _):
        without = {key: value for key, value in FULL.items() if key != name}
        for headers in (without, {**without, name: "  "}):
            status, _, text = await calls(method, path, headers)
            assert (status, name in text) == (400, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEED_PORT", "0"),
        ("SEED_PORT", "65536"),
        ("SEED_PORT", "x"),
        ("SEED_PORT", "9" * 4000),
        ("SEED_RANK", "-1"),
        ("SEED_RANK", "1.5"),
        ("SEED_REFCNT", "-1"),
        ("SEED_IP", "a/b"),
        ("SEED_IP", "ü"),
    ],
)
async def test_a_bad_header_is_a_400_that_names_it(name: str, value: str) -> None:
    async with planner() as (calls, _):
        status, _, text = await calls("POST", "/add_seed", FULL, {name: value})
        assert (status, name in text) == (400, True)


async def test_what_it_does_not_know_it_ignores() -> None:
    async with planner() as (calls, _):
        ours = {"RFORK-FINGERPRINT": "f", "RFORK-WAIT-SEC": "60", "RFORK-INTENT": "i", "Authorization": "Bearer t"}
        assert await calls.add(ours) == 200
        status, headers, _ = await calls("GET", "/get_seed", ours, SEED_KEY="none")
        assert status == 404
        assert not [name for name in headers if name.startswith("RFORK")]
        assert (await calls("POST", "/rfork_intent", ours, SEED_KEY="k"))[0] == 404


async def test_health_and_snapshot() -> None:
    async with planner() as (calls, virtual):
        await calls.add(key="UTF-8''caf%C3%A9")
        lease = await calls.get("UTF-8''caf%C3%A9")
        virtual.now_s += 5
        assert lease is not None
        assert (await calls("GET", "/healthz"))[2] == '{"status": "ok"}'
        async with calls._session.get(calls._url + "/debug/snapshot") as answer:
            assert (await answer.json())["seeds"] == [
                {
                    "key": "UTF-8''caf%C3%A9",
                    "ip": "10.0.0.1",
                    "port": 8080,
                    "rank": 0,
                    "draining": False,
                    "absent": False,
                    "present": False,
                    "seen_sec_ago": 5.0,
                    "leases": {lease["USER_ID"]: 55.0},
                }
            ]


async def test_the_sweep_runs_by_itself() -> None:
    virtual = VirtualTime()
    book = mock.Planner(clock=virtual.clock)
    async with serve(mock.make_app(book, sweep_every_s=0.01)) as url, aiohttp.ClientSession() as session:
        await Calls(session, url).add()
        virtual.now_s += 61
        await until(lambda: not book.seeds, "the stale seed is swept")
    assert len(asyncio.all_tasks()) == 1


def test_it_needs_aiohttp_and_nothing_of_the_package() -> None:
    tree = ast.parse(MOCK_PLANNER.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"aiohttp"}


@pytest.fixture
def process() -> Iterator[str]:
    """The script as a user starts it; its address, read from what it prints."""
    options = ["--host", "127.0.0.1", "--port", str(free_port()), "--lease-ttl-sec", "7", "--slots", "1"]
    command = [sys.executable, "-u", str(MOCK_PLANNER), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        assert started.stdout is not None
        try:
            for line in started.stdout:
                if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                    yield found[0]
                    break
            else:
                pytest.fail("it ended without an address")
        finally:
            started.terminate()
            assert started.wait(30) is not None


def test_the_script_serves_with_its_options(process: str) -> None:
    def ask(method: str, path: str, headers: dict[str, str]) -> dict[str, str]:
        request = urllib.request.Request(process + path, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return {name.upper(): value for name, value in answer.headers.items()}

    ask("POST", "/add_seed", FULL)
    assert ask("GET", "/get_seed", {"SEED_KEY": "k"})["LEASE_TTL_SEC"] == "7"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask("GET", "/get_seed", {"SEED_KEY": "k"})
