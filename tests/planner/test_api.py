"""The planner over HTTP, in this process: legacy calls to the letter, additional calls, and refusals."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDictProxy

from vllm_rfork import messages
from vllm_rfork.planner.app import PlannerProcess
from vllm_rfork.planner.http.auth import AddressCheck, Tokens, Trust
from vllm_rfork.planner.logs import TextLines
from vllm_rfork.planner.resolver import Resolver
from vllm_rfork.planner.settings import settings_from
from vllm_rfork.planner.store.errors import StoreUnavailable

SEED = {"SEED_IP": "127.0.0.1", "SEED_PORT": "5000", "SEED_RANK": "0"}
ADD = {"SEED_KEY": "k", **SEED, "SEED_REFCNT": "0"}
Headers = CIMultiDictProxy[str]


class Client:
    """Speaks to one planner with bare headers."""

    def __init__(self, planner: PlannerProcess, session: aiohttp.ClientSession) -> None:
        self.planner = planner
        self.session = session

    async def call(self, method: str, path: str, /, **headers: str) -> tuple[int, Headers, str]:
        async with self.session.request(method, self.planner.url + path, headers=headers) as answer:
            return answer.status, answer.headers, await answer.text()

    async def status(self, method: str, path: str, /, **headers: str) -> int:
        return (await self.call(method, path, **headers))[0]

    async def add(self, port: int = 5000, **headers: str) -> int:
        return await self.status("POST", "/add_seed", **{**ADD, "SEED_PORT": str(port), **headers})

    async def lease(self, key: str = "k", **headers: str) -> dict[str, str]:
        status, answer, text = await self.call("GET", "/get_seed", SEED_KEY=key, **headers)
        assert status == 200, (status, text)
        return {name: answer[name] for name in ("SEED_IP", "SEED_PORT", "SEED_RANK", "USER_ID")}

    async def waiting(self, count: int) -> None:
        """Return once ``count`` receivers stand in line."""
        await eventually(lambda: len(self.planner.queue) == count)


async def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def planner(environ: dict[str, str] | None = None, **settings: Any) -> AsyncIterator[Client]:
    settled = settings_from({"port": 0, **settings})
    tokens = Tokens(settled.token_file, environ or {})
    async with (
        PlannerProcess(settled, tokens=tokens).running() as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        yield Client(process, session)


# --- legacy calls --------------------------------------------------------------------------------------------------


async def test_an_old_client_sees_what_the_protocol_says() -> None:
    async with planner(slots=1) as client:
        assert await client.status("GET", "/get_seed", SEED_KEY="k") == 404
        assert await client.add() == 200
        status, answer, _ = await client.call("GET", "/get_seed", SEED_KEY="k")
        assert (status, answer["SEED_IP"], answer["SEED_PORT"], answer["SEED_RANK"]) == (200, "127.0.0.1", "5000", "0")
        assert answer["LEASE_TTL_SEC"] == "60"
        assert messages.INTENT not in answer
        lease = {**SEED, "USER_ID": answer["USER_ID"]}
        assert await client.status("GET", "/get_seed", SEED_KEY="k") == 404
        assert await client.status("POST", "/renew_seed_lease", **lease) == 200
        assert await client.status("POST", "/remove_seed", SEED_KEY="k", **SEED) == 409
        assert await client.add() == 200
        assert await client.status("POST", "/put_seed", **lease) == 200
        assert await client.status("POST", "/put_seed", **lease) == 404
        assert await client.status("POST", "/renew_seed_lease", **lease) == 404
        assert await client.add() == 200
        assert await client.status("POST", "/remove_seed", SEED_KEY="other", **SEED) == 404
        assert await client.status("POST", "/remove_seed", SEED_KEY="k", **SEED) == 200
        assert await client.status("POST", "/remove_seed", SEED_KEY="k", **SEED) == 404
        status, _, text = await client.call("GET", "/healthz")
        assert (status, json.loads(text)) == (200, {"status": "ok"})
        assert json.loads((await client.call("GET", "/debug/snapshot"))[2])["seeds"] == []


REQUIRED = {
    ("POST", "/add_seed"): ADD,
    ("GET", "/get_seed"): {"SEED_KEY": "k"},
    ("GET", "/rfork_find_seed"): {"SEED_KEY": "k"},
    ("POST", "/put_seed"): {**SEED, "USER_ID": "u"},
    ("POST", "/renew_seed_lease"): {**SEED, "USER_ID": "u"},
    ("POST", "/remove_seed"): {"SEED_KEY": "k", **SEED},
    ("POST", "/rfork_intent"): {"SEED_KEY": "k", "RFORK-INTENT": "i"},
}


OPTIONAL = ("SEED_RANK", "SEED_REFCNT")


async def test_rank_and_reference_count_may_be_missing_from_every_call() -> None:
    """As vLLM-Ascend's clients after 0.30.0rc2 may send them; a missing or empty rank is 0."""
    named = {name: value for name, value in SEED.items() if name not in OPTIONAL}
    async with planner() as client:
        for blank in ({}, dict.fromkeys(OPTIONAL, " ")):
            assert await client.status("POST", "/add_seed", SEED_KEY="k", **named, **blank) == 200
            status, lease, _ = await client.call("GET", "/get_seed", SEED_KEY="k")
            assert (status, lease["SEED_RANK"]) == (200, "0")
            held = {**named, **blank, "USER_ID": lease["USER_ID"]}
            assert await client.status("POST", "/renew_seed_lease", **held) == 200
            assert await client.status("POST", "/put_seed", **held) == 200
            assert await client.status("POST", "/remove_seed", SEED_KEY="k", **named, **blank) == 200


@pytest.mark.parametrize("call", ["/put_seed", "/renew_seed_lease"])
@pytest.mark.parametrize("user_id", ["u", "UTF-8''%FF", "UTF-8''caf%C3%A9", "rf1.0.0", "x" * 4000])
async def test_an_unknown_lease_is_a_404_whatever_its_id(call: str, user_id: str) -> None:
    """A legacy client whose put_seed is answered 400 never becomes a seed."""
    async with planner() as client:
        assert await client.status("POST", call, **SEED, USER_ID=user_id) == 404


@pytest.mark.parametrize(("call", "headers"), REQUIRED.items(), ids=lambda each: each[1] if type(each) is tuple else "")
async def test_every_missing_or_empty_header_is_named(call: tuple[str, str], headers: dict[str, str]) -> None:
    async with planner() as client:
        for name in headers.keys() - set(OPTIONAL):
            for rest in ({key: value for key, value in headers.items() if key != name}, {**headers, name: " "}):
                status, _, text = await client.call(*call, **rest)
                assert (status, name in text) == (400, True), (name, text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SEED_PORT", "0"),
        ("SEED_PORT", "65536"),
        ("SEED_PORT", "1.5"),
        ("SEED_PORT", "９"),
        ("SEED_PORT", "+1"),
        ("SEED_PORT", "1_0"),
        ("SEED_RANK", "-0"),
        ("SEED_RANK", "-1"),
        ("SEED_RANK", "x"),
        ("SEED_REFCNT", "-1"),
        ("SEED_IP", "a b"),
        ("SEED_IP", "a/../b"),
        ("SEED_KEY", "UTF-8''%ff"),
        ("SEED_KEY", "x" * 2049),
        ("RFORK-SLOTS", "0"),
        ("RFORK-LABELS", "host"),
        ("RFORK-EPOCH", "x" * 257),
    ],
)
async def test_every_bad_header_is_named(name: str, value: str) -> None:
    async with planner() as client:
        status, _, text = await client.call("POST", "/add_seed", **{**ADD, name: value})
        assert status == 400
        assert name in text or "UTF-8" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RFORK-WAIT-SEC", "soon"),
        ("RFORK-WAIT-SEC", "nan"),
        ("RFORK-WAIT-SEC", "1e1"),
        ("RFORK-WAIT-SEC", "1_0"),
        ("RFORK-EXCLUDE", "a:b"),
        ("RFORK-EXCLUDE", "a:1:1," * 257),
    ],
)
async def test_bad_wishes_are_refused(name: str, value: str) -> None:
    async with planner() as client:
        assert await client.status("GET", "/get_seed", SEED_KEY="k", **{name: value}) == 400


@pytest.mark.parametrize("value", ["-1", "+1", "1_0", "1e1", "１", "", "100001"])
async def test_a_bad_query_parameter_is_named(value: str) -> None:
    async with (
        planner() as client,
        aiohttp.ClientSession() as session,
        session.get(client.planner.url + "/debug/snapshot", params={"limit": value}) as answer,
    ):
        assert (answer.status, "parameter limit" in await answer.text()) == (400, True)


READ_ONLY = ["/", "/healthz", "/readyz", "/metrics", "/debug/snapshot", "/openapi.json", "/dashboard.json"]


@pytest.mark.parametrize("path", READ_ONLY)
async def test_head_is_get_without_the_body(path: str) -> None:
    async with planner() as client:
        status, headers, body = await client.call("HEAD", path)
        assert (status, body) == (200, "")
        assert headers["Content-Type"] == (await client.call("GET", path))[1]["Content-Type"]
        # a snapshot is written as it is made, so that its length is not known
        assert "Content-Length" not in headers if path == "/debug/snapshot" else int(headers["Content-Length"]) > 0


async def test_head_is_refused_where_get_changes_the_state() -> None:
    async with planner() as client:
        await client.add()
        assert (await client.call("HEAD", "/get_seed", SEED_KEY="k"))[:1] == (405,)
        status, headers, _ = await client.call("PUT", "/healthz")
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
        await client.lease()  # it was not granted to nobody


async def test_metrics_are_served_while_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away() -> None:
        raise StoreUnavailable("Redis is not reachable")

    async with planner() as client:
        await client.add()
        page = (await client.call("GET", "/metrics"))[2].splitlines()
        assert "rfork_planner_store_up 1.0" in page
        assert "rfork_planner_keys 1.0" in page
        with monkeypatch.context() as broken:
            broken.setattr(client.planner.store, "totals", away)
            status, _, text = await client.call("GET", "/metrics")
        assert status == 200
        assert "rfork_planner_store_up 0.0" in text.splitlines()
        assert 'rfork_planner_requests_total{call="/add_seed",code="200"} 1.0' in text
        assert "rfork_planner_keys" not in text
        assert "rfork_planner_store_up 1.0" in (await client.call("GET", "/metrics"))[2]


async def test_hyphens_count_as_underscores() -> None:
    async with planner() as client:
        assert await client.status("POST", "/add_seed", **{k.replace("_", "-"): v for k, v in ADD.items()}) == 200
        lease = await client.lease()
        assert await client.status("POST", "/put_seed", **{k.replace("_", "-"): v for k, v in lease.items()}) == 200


async def test_a_key_in_any_spelling_is_one_key() -> None:
    async with planner() as client:
        assert await client.add(SEED_KEY=messages.encode_text("模型$prod")) == 200
        await client.lease("模型$prod")  # raw UTF-8, as careless clients send it


async def test_unknown_calls_and_methods_are_refused() -> None:
    async with planner() as client:
        assert await client.status("GET", "/nothing") == 404
        status, headers, _ = await client.call("GET", "/add_seed")
        assert (status, headers["Allow"]) == (405, "POST")
        assert await client.status("GET", "/renew_seed_lease") == 405


# --- waiting ---------------------------------------------------------------------------------------------------------


async def test_ten_start_together_and_one_reads_storage() -> None:
    async with planner(slots=1) as client:

        async def replica(number: int) -> str:
            headers = {"SEED_KEY": "k", "RFORK-WAIT-SEC": "30", "RFORK-INTENT": f"replica{number}"}
            status, answer, _ = await client.call("GET", "/get_seed", **headers)
            if status == 404:
                assert answer["RFORK-INTENT"] == "granted"
                await client.waiting(9)
            # Loaded or forked: a seed now.
            assert await client.add(6000 + number, **{"RFORK-INTENT": f"replica{number}"}) == 200
            return "storage" if status == 404 else answer["SEED_PORT"]

        sources = await asyncio.wait_for(asyncio.gather(*map(replica, range(10))), 30)
        assert sources.count("storage") == 1
        assert len(set(sources)) == 10, "each seed served one receiver, and each new seed the next"


async def test_a_wait_is_over_when_it_is_over() -> None:
    async with planner() as client:
        started_at = time.monotonic()
        assert await client.status("GET", "/get_seed", SEED_KEY="k", **{"RFORK-WAIT-SEC": "0.2"}) == 404
        assert time.monotonic() - started_at >= 0.19
        await client.waiting(0)
        assert json.loads((await client.call("GET", "/debug/snapshot"))[2])["waiting"] == []


async def test_the_fleets_default_wait_counts_where_the_receiver_states_none() -> None:
    async with planner(seed_wait_sec=30, max_wait_sec=40) as client:
        assert await client.status("GET", "/get_seed", SEED_KEY="k", **{"RFORK-WAIT-SEC": "0"}) == 404
        task = asyncio.create_task(client.lease())
        await client.waiting(1)
        snapshot = json.loads((await client.call("GET", "/debug/snapshot"))[2])
        assert snapshot["waiting"][0]["wait_s"] == pytest.approx(30, abs=0.5)
        await client.add()
        assert (await asyncio.wait_for(task, 30))["SEED_PORT"] == "5000"


async def test_a_receiver_that_hangs_up_leaves_no_place_no_lease_and_no_intent() -> None:
    async with planner() as client:
        await client.status("POST", "/rfork_intent", **{"SEED_KEY": "k", "RFORK-INTENT": "loading"})
        gone = asyncio.create_task(client.lease(**{"RFORK-WAIT-SEC": "30", "RFORK-INTENT": "gone"}))
        await client.waiting(1)
        gone.cancel()
        await client.waiting(0)
        snapshot = json.loads((await client.call("GET", "/debug/snapshot"))[2])
        assert ([each["intent"] for each in snapshot["intents"]], snapshot["waiting"]) == (["loading"], [])
        await client.add()
        await client.lease()


async def test_a_result_of_a_later_version_ends_the_lease_like_none() -> None:
    async with planner(slots=1) as client:
        await client.add()
        for _ in range(2):
            lease = await client.lease()
            assert await client.status("POST", "/put_seed", **lease, **{"RFORK-RESULT": "partly"}) == 200
        assert 'rfork_planner_forks_total{result="released"} 2.0' in (await client.call("GET", "/metrics"))[2]


async def test_a_failed_fork_is_counted_and_another_seed_is_given() -> None:
    async with planner(failures_before_backoff=1, slots=1) as client:
        await client.add(5000)
        await client.add(5001)
        first = await client.lease()
        told = {"RFORK-RESULT": "failed", "RFORK-CAUSE": "EngineError", "RFORK-SECONDS": "1.5", "RFORK-NBYTES": "7"}
        assert await client.status("POST", "/put_seed", **first, **told) == 200
        name = ":".join(first[each] for each in ("SEED_IP", "SEED_PORT", "SEED_RANK"))
        second = await client.lease(**{"RFORK-EXCLUDE": name})
        assert second["SEED_PORT"] != first["SEED_PORT"]
        assert await client.status("GET", "/get_seed", SEED_KEY="k") == 404, "the failed one is quarantined"
        snapshot = json.loads((await client.call("GET", "/debug/snapshot"))[2])
        assert snapshot["history"][0]["cause"] == "EngineError"
        page = (await client.call("GET", "/metrics"))[2]
        assert 'rfork_planner_fork_failures_total{cause="EngineError"} 1.0' in page


async def test_each_fork_is_one_line_and_a_quarantine_lists_its_causes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vllm_rfork.planner")
    async with planner(failures_before_backoff=2) as client:
        await client.add(5000)
        done = {"RFORK-RESULT": "ok", "RFORK-SECONDS": "2", "RFORK-NBYTES": "4000000000", "RFORK-LANE": "nixl/rdma"}
        lease = await client.lease(**{"RFORK-LABELS": "host=node-1"})
        assert await client.status("POST", "/put_seed", **lease, **done) == 200
        for number in range(2):
            lease = await client.lease(**{"RFORK-LABELS": f"host=node-{number}"})
            told = {"RFORK-RESULT": "failed", "RFORK-CAUSE": "SeedError", "RFORK-SIDE": "seed"}
            assert await client.status("POST", "/put_seed", **lease, **told) == 200
        status, answer, text = await client.call("GET", "/get_seed", SEED_KEY="k")
        assert (status, answer["RFORK-MISS"], "quarantined" in text) == (404, "quarantined", True)
        metrics = (await client.call("GET", "/metrics"))[2]
    assert 'rfork_planner_misses_total{key="k",model="",reason="quarantined",strategy=""} 1.0' in metrics
    assert 'rfork_planner_fork_seconds_sum{engine="nixl"} 2.0' in metrics
    lines = [TextLines().format(record) for record in caplog.records]
    (completed,) = [line for line in lines if "Fork completed" in line]
    assert completed.endswith(
        "key='k' seed='127.0.0.1:5000:0' receiver='127.0.0.1 (host=node-1)' nbytes=4000000000 seconds=2.0 "
        "gb_per_s=2.0 lane='nixl/rdma'"
    )
    assert len([line for line in lines if "Fork failed" in line and "side='seed'" in line]) == 2
    (quarantined,) = [line for line in lines if "Seed quarantined" in line]
    assert "causes='SeedError (127.0.0.1 (host=node-0)), SeedError (127.0.0.1 (host=node-1))'" in quarantined


async def test_a_miss_names_the_other_fingerprints() -> None:
    async with planner() as client:
        await client.add(5000, **{"RFORK-FINGERPRINT": "f2"})
        await client.add(5001, **{"RFORK-FINGERPRINT": "f2"})
        asked = {"SEED_KEY": "k", "RFORK-FINGERPRINT": "f1"}
        status, answer, _ = await client.call("GET", "/get_seed", **asked)
    assert (status, answer["RFORK-MISS"]) == (404, "fingerprint")
    assert re.fullmatch(r"f2;2;127\.0\.0\.1:500[01]:0", answer["RFORK-OTHER-FINGERPRINTS"])


async def test_a_miss_is_readable_however_long_the_other_fingerprints_are() -> None:
    async with planner() as client:
        for number in range(4):
            longest = messages.encode_text(chr(0x1F600 + number) * 256)
            assert await client.add(5000 + number, **{"RFORK-FINGERPRINT": longest}) == 200
        # aiohttp's client, like others, refuses an answer with a header line of more than 8190 bytes.
        asked = {"SEED_KEY": "k", "RFORK-FINGERPRINT": "f1", "RFORK-INTENT": "a"}
        status, answer, _ = await client.call("GET", "/get_seed", **asked)
    assert (status, answer["RFORK-INTENT"]) == (404, "granted")
    assert [each.seeds for each in messages.other_fingerprints(answer)] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "asked", "ttl"), [({}, {}, "60"), ({}, {"RFORK-TICKET": "t"}, "30"), ({"intent_ttl_sec": 9}, {}, "9")]
)
async def test_a_receiver_that_loads_is_told_how_long_that_is_remembered(
    settings: dict[str, float], asked: dict[str, str], ttl: str
) -> None:
    async with planner(**settings) as client:
        headers = {"SEED_KEY": "k", "RFORK-INTENT": "a", **asked}
        answer = (await client.call("GET", "/get_seed", **headers))[1]
    assert answer["RFORK-INTENT-TTL-SEC"] == ttl


async def test_an_intent_can_be_renewed_and_taken_back() -> None:
    async with planner() as client:
        headers = {"SEED_KEY": "k", "RFORK-INTENT": "a"}
        assert await client.status("GET", "/get_seed", **headers) == 404
        assert await client.status("POST", "/rfork_intent", **headers, **{"RFORK-INTENT-TTL-SEC": "60"}) == 200
        waiting = asyncio.create_task(
            client.call("GET", "/get_seed", SEED_KEY="k", **{"RFORK-INTENT": "b", "RFORK-WAIT-SEC": "30"})
        )
        await client.waiting(1)
        assert await client.status("POST", "/rfork_intent", **headers, **{"RFORK-INTENT-TTL-SEC": "0"}) == 200
        status, answer, _ = await asyncio.wait_for(waiting, 30)
        assert (status, answer["RFORK-INTENT"]) == (404, "granted")


# --- tickets ---------------------------------------------------------------------------------------------------------


def ticket(name: str, **more: str) -> dict[str, str]:
    return {"RFORK-TICKET": name, "RFORK-INTENT": f"worker {name}", **more}


async def test_a_ticket_waits_in_slices_and_is_told_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "SLICE_S", 0.3)
    async with planner(slots=1) as client:
        await client.add()
        held = await client.lease()
        status, answer, _ = await client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a"))
        assert (status, answer["RFORK-WAITING"]) == (404, "position=1; bound=120; reason=busy")
        assert "RFORK-INTENT" not in answer, "it does not load"
        for _ in range(2):
            asked_at = time.monotonic()
            status, answer, _ = await client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a"))
            assert (status, answer["RFORK-WAITING"]) == (404, "position=1; bound=120; reason=busy")
            assert time.monotonic() - asked_at >= 0.29
        monkeypatch.setattr(messages, "SLICE_S", 60.0)
        waiting = asyncio.create_task(client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a")))
        await client.waiting(1)
        assert await client.status("POST", "/put_seed", **held) == 200
        status, answer, _ = await asyncio.wait_for(waiting, 20)
        assert (status, answer["RFORK-TICKET"], answer["LEASE_TTL_SEC"]) == (200, "a", "60")
        again = await client.lease(**ticket("a"))
        assert again["USER_ID"] == answer["USER_ID"]
        page = (await client.call("GET", "/metrics"))[2]
        misses = re.findall(r'rfork_planner_misses_total\{key="k".*\} (\S+)', page)
        assert set(misses) == {"0.0"}, "a slice that is over is no miss"
        assert 'rfork_planner_wait_seconds_count{result="granted"} 1.0' in page


async def test_a_ticket_that_is_to_load_is_told_why_it_does_not_wait() -> None:
    async with planner() as client:
        status, answer, text = await client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a"))
        assert (status, answer["RFORK-INTENT"], "RFORK-WAITING" in answer) == (404, "granted", False)
        assert text == "no suitable seed is serving, and nobody loads the weights\n"


async def test_a_ticket_whose_connection_breaks_keeps_its_place() -> None:
    async with planner(slots=1) as client:
        await client.add()
        held = await client.lease()
        for name in "ab":
            await client.status("GET", "/get_seed", SEED_KEY="k", **ticket(name))
        broken = asyncio.create_task(client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a")))
        await client.waiting(1)
        broken.cancel()
        await client.waiting(0)
        status, answer, _ = await client.call("GET", "/get_seed", SEED_KEY="k", **ticket("c"))
        assert (status, answer["RFORK-WAITING"].split(";")[0]) == (404, "position=3")
        again = asyncio.create_task(client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a")))
        await client.waiting(1)
        assert await client.status("POST", "/put_seed", **held) == 200
        assert (await asyncio.wait_for(again, 20))[0] == 200


async def test_two_questions_with_one_ticket_are_given_one_lease() -> None:
    """The first connection is dead, and nobody has noticed yet."""
    async with planner(slots=1) as client:
        await client.add()
        held = await client.lease()
        await client.status("GET", "/get_seed", SEED_KEY="k", **ticket("a"))
        first = asyncio.create_task(client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a")))
        await client.waiting(1)
        second = asyncio.create_task(client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a")))
        await asyncio.sleep(0.2)
        assert await client.status("POST", "/put_seed", **held) == 200
        assert (await asyncio.wait_for(second, 20))[0] == 200
        first.cancel()
        snapshot = json.loads((await client.call("GET", "/debug/snapshot"))[2])
        assert len(snapshot["leases"]) == 1


async def test_a_planner_that_stops_sends_tickets_away_for_a_moment() -> None:
    async with planner(slots=1) as client:
        await client.add()
        await client.lease()
        await client.status("GET", "/get_seed", SEED_KEY="k", **ticket("a"))
        waiting = asyncio.create_task(client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a")))
        await client.waiting(1)
        await client.planner.queue.close(5)
        status, answer, _ = await asyncio.wait_for(waiting, 20)
        assert (status, answer["Retry-After"]) == (503, "1")


@pytest.mark.parametrize("settings", [{"default_wait_sec": 0.0}, {"max_wait_sec": 0.0}], ids=str)
async def test_waits_by_ticket_can_be_turned_off(settings: dict[str, float]) -> None:
    async with planner(slots=1, **settings) as client:
        await client.add()
        await client.lease()
        status, answer, _ = await client.call("GET", "/get_seed", SEED_KEY="k", **ticket("a"))
        assert (status, answer["RFORK-INTENT"]) == (404, "granted")


# --- receivers that are gone -----------------------------------------------------------------------------------------


async def test_no_lease_is_left_with_receivers_that_hang_up_at_once() -> None:
    async with planner(slots=64) as client:
        await client.add()
        for _ in range(50):
            _, writer = await asyncio.open_connection("127.0.0.1", client.planner.port)
            writer.write(b"GET /get_seed HTTP/1.1\r\nHost: p\r\nSEED_KEY: k\r\n\r\n")
            writer.close()
            await writer.wait_closed()
        await client.status("GET", "/healthz")  # after whatever came before
        await asyncio.sleep(0.2)
        assert json.loads((await client.call("GET", "/debug/snapshot"))[2])["leases"] == []


async def test_receivers_that_die_before_they_read_their_lease_cost_a_slot_for_a_moment() -> None:
    """The answer was written before the connection broke: only the confirmation tells."""
    async with planner(slots=64) as client:
        await client.add()
        for number in range(50):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.planner.port)
            writer.write(b"GET /get_seed HTTP/1.1\r\nHost: p\r\nSEED_KEY: k\r\nRFORK-TICKET: t%d\r\n\r\n" % number)
            await reader.readuntil(b"\r\n")
            writer.close()
        leases = json.loads((await client.call("GET", "/debug/snapshot"))[2])["leases"]
        assert len(leases) == 50
        assert all(each["expires_in_s"] <= 10 for each in leases)


# --- letting nobody in -----------------------------------------------------------------------------------------------

SECRET, NEXT_SECRET = "first-secret-value", "second-secret-value"


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def test_without_a_token_only_probes_are_answered() -> None:
    async with planner({"RFORK_TOKEN": SECRET}) as client:
        paths = [*REQUIRED, ("GET", "/metrics"), ("GET", "/debug/snapshot")]
        wrong = ({}, bearer("wrong"), bearer(""), {"Authorization": SECRET}, {"Authorization": f"Basic {SECRET}"})
        for method, path in paths:
            for authorization in wrong:
                status, headers, _ = await client.call(
                    method, path, **REQUIRED.get((method, path), {}), **authorization
                )
                assert status == 401
                assert headers["WWW-Authenticate"].startswith("Bearer")
        assert await client.status("GET", "/healthz") == 200
        assert await client.status("GET", "/readyz") == 200
        assert await client.add(**bearer(SECRET)) == 200


async def test_two_tokens_are_valid_while_they_are_rotated(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{SECRET}\n")
    now = [0.0]
    tokens = Tokens(file, {}, lambda: now[0])

    def valid() -> list[bool]:
        now[0] += 2
        return [tokens.admit(f"Bearer {each}") for each in (SECRET, NEXT_SECRET)]

    assert valid() == [True, False]
    file.write_text(f"{NEXT_SECRET}\n{SECRET}\n")
    assert valid() == [True, True]
    file.write_text("")
    assert valid() == [True, True], "an unusable file keeps the earlier tokens"
    file.write_text(f"{NEXT_SECRET}\n")
    assert valid() == [False, True]
    file.unlink()
    assert valid() == [False, True]
    both = Tokens(None, {"RFORK_TOKEN": SECRET, "RFORK_TOKEN_PREVIOUS": NEXT_SECRET})
    assert [both.admit(f"bearer {each}") for each in (SECRET, NEXT_SECRET)] == [True, True]


async def test_no_credential_is_logged_or_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with planner({"RFORK_TOKEN": SECRET}) as client:
        await client.add(**bearer(SECRET))
        lease = await client.lease(**bearer(SECRET))
        await client.status("GET", "/metrics", **bearer("wrong-secret-value"))
        seen = caplog.text
        for path in ("/metrics", "/debug/snapshot"):
            seen += (await client.call("GET", path, **bearer(SECRET)))[2]
    assert "Seed added" in seen
    for secret in (SECRET, "wrong-secret-value", lease["USER_ID"], lease["USER_ID"].rpartition(".")[2]):
        assert secret not in seen


async def test_a_malformed_request_does_not_bring_its_token_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with planner({"RFORK_TOKEN": SECRET}) as client:
        for token in (f"{SECRET}\x01", SECRET + 9000 * "x"):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.planner.port)
            writer.write(f"GET /get_seed HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
            assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.0 400")
            writer.close()
        assert await client.add(**bearer(SECRET)) == 200
    assert SECRET not in caplog.text


async def test_a_call_that_fails_is_answered_logged_and_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with planner() as client:
        with monkeypatch.context() as broken:
            broken.setattr(client.planner.store, "announce", None)
            assert await client.status("POST", "/add_seed", **ADD) == 500
        assert await client.add() == 200
        counted = (await client.call("GET", "/metrics"))[2]
    assert "POST /add_seed failed" in caplog.text
    assert 'rfork_planner_requests_total{call="/add_seed",code="500"} 1.0' in counted


async def test_sweeping_goes_on_after_a_failure(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    async with planner(sweep_every_sec=0.05, stale_after_sec=0.3) as client:
        with monkeypatch.context() as broken:
            broken.setattr(client.planner.store, "sweep", None)
            await eventually(lambda: "A sweep failed" in caplog.text)
        assert await client.add() == 200
        await eventually(lambda: "Seed dropped" in caplog.text)


async def test_a_caller_announces_and_withdraws_its_own_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AddressCheck, "__init__", functools.partialmethod(AddressCheck.__init__, resolver=KNOWN_NAMES))
    async with planner() as client:
        for foreign in ("10.1.2.3", "192.0.2.1", "no-such-host.invalid", "elsewhere.example"):
            status, _, text = await client.call("POST", "/add_seed", **{**ADD, "SEED_IP": foreign})
            assert (status, "--trust-announced-address" in text) == (403, True), foreign
            assert "rfork_seed_advertise_host" in text
            assert "VLLM_HOST_IP" in text
            remove = {"SEED_KEY": "k", **SEED, "SEED_IP": foreign}
            assert await client.status("POST", "/remove_seed", **remove) == 403
        for own in ("127.0.0.1", "127.0.0.9", "localhost", "::1", "[::1]", "::ffff:127.0.0.1"):
            assert await client.add(SEED_IP=own) == 200, own
    async with planner(trust_announced_address=True) as client:
        assert await client.add(SEED_IP="10.1.2.3") == 200


async def test_every_spelling_of_an_address_is_one_seed_and_one_lease() -> None:
    async with planner(slots=1) as client:
        for own in ("127.1", "0x7f000001", "0177.0.0.1", "2130706433", "[::ffff:127.0.0.1]", "127.0.0.1"):
            assert await client.add(SEED_IP=own) == 200, own
        status, headers, _ = await client.call("GET", "/get_seed", SEED_KEY="k")
        assert (status, headers["SEED_IP"]) == (200, "127.0.0.1")
        assert await client.status("GET", "/get_seed", SEED_KEY="k") == 404, "one slot, not one for each spelling"
        given = {name: headers[name] for name in ("SEED_PORT", "SEED_RANK", "USER_ID")}
        assert await client.status("POST", "/put_seed", **given, SEED_IP="127.1") == 200
        excluded = f"127.1:{given['SEED_PORT']}:{given['SEED_RANK']}"
        assert await client.status("GET", "/get_seed", **{"SEED_KEY": "k", "RFORK-EXCLUDE": excluded}) == 404
        for nobody in ("127.0.0.1%junk", "localhost%junk", "0.0.0.0", "::", "224.0.0.1", "0x1ffffffff", "fe80::1%a/b"):
            assert await client.add(SEED_IP=nobody) == 400, nobody


async def test_a_token_speaks_for_addresses_on_another_network_but_not_for_loopback() -> None:
    member = {"Authorization": "Bearer secret"}
    environ = {"RFORK_TOKEN": "secret"}
    async with planner(environ) as client:
        assert await client.add(SEED_IP="10.1.2.3") == 401
        assert await client.add(SEED_IP="10.1.2.3", **member) == 200
        remove = {"SEED_KEY": "k", **SEED, "SEED_IP": "10.1.2.3", **member}
        assert await client.status("POST", "/remove_seed", **remove) == 200
    async with planner(environ, check_announced_address=True) as client:
        assert await client.add(SEED_IP="10.1.2.3", **member) == 403
        assert await client.add(**member) == 200
    members = AddressCheck(Trust.MEMBERS, resolver=KNOWN_NAMES)
    assert await members.allows("10.1.2.3", "192.0.2.5")
    for loopback in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert not await members.allows(loopback, "192.0.2.5"), loopback


class KnownNames(Resolver):
    async def addresses(self, name: str, caller: str) -> list[str]:
        return {"localhost": ["127.0.0.1"], "elsewhere.example": ["192.0.2.7"]}.get(name, [])


KNOWN_NAMES = KnownNames()


async def test_a_name_that_cannot_be_looked_up_now_is_answered_later(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()

    def find(name: str) -> list[str]:
        slow.wait()
        return ["127.0.0.1"]

    monkeypatch.setattr("vllm_rfork.planner.resolver.TIMEOUT_S", 0.05)
    stuck = Resolver(find=find)
    monkeypatch.setattr(AddressCheck, "__init__", functools.partialmethod(AddressCheck.__init__, resolver=stuck))
    async with planner() as client:
        status, headers, text = await client.call("POST", "/add_seed", **{**ADD, "SEED_IP": "own.example"})
        assert (status, headers["Retry-After"], "own.example" in text) == (503, "5", True)
        assert await client.add() == 200, "an address needs no look-up"
        slow.set()


async def test_oversized_requests_are_refused_and_the_planner_lives_on() -> None:
    async with planner(max_key_length=10, max_seeds=1) as client:
        assert await client.status("POST", "/add_seed", **{**ADD, "X-Long": "x" * 9000}) == 400
        assert await client.status("POST", "/add_seed", **ADD, **{f"X-{n}": "x" for n in range(200)}) == 400
        assert await client.add(SEED_KEY="x" * 11) == 400
        assert await client.add() == 200
        assert await client.add(5001) == 429


async def test_what_alerts_are_about_begins_at_zero() -> None:
    async with planner() as client:
        page = (await client.call("GET", "/metrics"))[2].splitlines()
    for series in (
        'fork_failures_total{cause="VerificationError"}',
        'refused_total{reason="token"}',
        'refused_total{reason="address"}',
        'refused_total{reason="limit"}',
        'events_total{kind="lease_expired"}',
    ):
        assert f"rfork_planner_{series} 0.0" in page


def test_an_ipv6_address_is_said_in_brackets() -> None:
    for host, url in (("::1", "http://[::1]:1223"), ("::", "http://[::1]:1223"), ("0.0.0.0", "http://127.0.0.1:1223")):
        assert PlannerProcess(settings_from({"host": host}), tokens=Tokens(None, {})).url == url


async def test_metric_labels_are_bounded() -> None:
    async with planner(max_metric_keys=2) as client:
        for number in range(5):
            await client.add(5000 + number, SEED_KEY=f"key{number}")
            lease = await client.lease(f"key{number}")
            told = {"RFORK-RESULT": "failed", "RFORK-CAUSE": f"Made{number}Up"}
            assert await client.status("POST", "/put_seed", **lease, **told) == 200
        page = (await client.call("GET", "/metrics"))[2]
        assert 'rfork_planner_seeds{key="key1",model="",state="serving",strategy=""} 1.0' in page
        assert 'rfork_planner_seeds{key="(other)",model="",state="serving",strategy=""} 3.0' in page
        assert 'rfork_planner_grants_total{key="(other)",model="",strategy=""} 3.0' in page
        assert "key2" not in page
        assert 'rfork_planner_fork_failures_total{cause="(other)"} 5.0' in page


async def test_draining_sends_the_waiting_away_and_finishes_what_is_under_way() -> None:
    async with contextlib.AsyncExitStack() as outer:
        session = await outer.enter_async_context(aiohttp.ClientSession())
        process = PlannerProcess(settings_from({"port": 0}), tokens=Tokens(None, {}))
        async with process.running():
            client = Client(process, session)
            waiting = asyncio.create_task(client.call("GET", "/get_seed", SEED_KEY="k", **{"RFORK-WAIT-SEC": "60"}))
            await client.waiting(1)
        status, headers, _ = await asyncio.wait_for(waiting, 30)
        assert (status, headers["Retry-After"]) == (503, "1")
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.call("GET", "/healthz")
