"""The planner client against every kind of planner, and against services that are not planners."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from tests.planner.processes import PlannerUnderTest
from tests.unit.interop_planners import (
    HyphenPlanner,
    OldPlanner,
    ProductionPlanner,
    behind_nginx,
    free_port,
    load_mock_planner,
    raw_server,
    serve,
)
from vllm_rfork import messages
from vllm_rfork.clients import Outcome, PlannerClient
from vllm_rfork.errors import NoSeedAvailable, PlannerError
from vllm_rfork.messages import Lease, SeedAddress
from vllm_rfork.messages.metering import Served

KEY = "/models/q$prod$kv_both$0$0"
SEED = SeedAddress("10.0.0.1", 8080, 0)
LEASE = Lease(SEED, "u1", 60.0)
#: Far above what a call takes here, far below what a hang would take.
TEST_LIMIT_S = 120.0


class Pauses:
    """Takes the place of sleeping: keeps what was asked for and returns at once."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []

    async def __call__(self, delay_s: float) -> None:
        self.asked_s.append(delay_s)


def scripted(path: str, *statuses: int, method: str = "POST") -> tuple[web.Application, list[web.Request]]:
    """A planner that answers ``path`` with each status in turn and then with the last one again."""
    seen: list[web.Request] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request)
        return web.Response(status=statuses[min(len(seen), len(statuses)) - 1], text="as the script says")

    app = web.Application()
    app.router.add_route(method, path, handle)
    return app, seen


# --- legacy planners ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "planner",
    [OldPlanner(), ProductionPlanner(), HyphenPlanner(), "mock", "mock behind nginx"],
    ids=lambda planner: planner if isinstance(planner, str) else type(planner).__name__,
)
async def test_a_fork_goes_round_with_every_kind_of_planner(planner: Any) -> None:
    if isinstance(planner, str):
        mock = load_mock_planner()
        app = mock.make_app(mock.Planner(slots=1))
        app = behind_nginx(app) if "nginx" in planner else app
    else:
        app = planner.app()
    async with serve(app) as url:
        client = PlannerClient(url)
        with pytest.raises(NoSeedAvailable):
            await client.acquire(KEY)
        await client.announce(KEY, SEED, fingerprint="f" * 64, slots=2, labels="host=a", epoch="e1", intent="i1")
        lease = await client.acquire(
            KEY, fingerprint="f" * 64, wait_s=0.1, exclude=[SeedAddress("10.0.0.9", 1, 0)], intent="i2", labels="host=b"
        )
        assert lease.seed == SEED
        with pytest.raises(NoSeedAvailable):
            await client.acquire(KEY)
        if lease.ttl_s is not None:
            assert await client.renew(lease) is Outcome.DONE
        assert await client.release(lease, result="ok", nbytes=10, seconds=0.5, cause="") is Outcome.DONE
        assert (await client.acquire(KEY)).seed == SEED


async def test_old_planners_decline_what_they_do_not_know_and_nothing_breaks() -> None:
    async with serve(OldPlanner().app()) as url:
        client = PlannerClient(url)
        await client.announce(KEY, SEED)
        assert (await client.acquire(KEY)).ttl_s is None
        assert await client.withdraw(KEY, SEED) is Outcome.UNKNOWN
        assert await client.intend(KEY, "i1", ttl_s=600) is Outcome.UNKNOWN
        assert not await client.renews_leases()
        for call in (client.healthz, client.snapshot):
            with pytest.raises(PlannerError, match="404"):
                await call()


async def test_a_lease_that_expired_at_the_production_planner_is_simply_gone() -> None:
    planner = ProductionPlanner()
    async with serve(planner.app()) as url:
        client = PlannerClient(url, sleep=Pauses())
        await client.announce(KEY, SEED)
        lease = await client.acquire(KEY)
        planner.expire_all()
        assert await client.renew(lease) is Outcome.UNKNOWN
        assert await client.release(lease) is Outcome.UNKNOWN


async def test_absent_values_send_no_header() -> None:
    planner = OldPlanner()
    async with serve(planner.app()) as url:
        client = PlannerClient(url)
        await client.announce(KEY, SEED)
        await client.acquire(KEY)
    sent = {name.upper() for headers in planner.seen_headers for name in headers}
    assert not [name for name in sent if name.startswith(("RFORK", "AUTHORIZATION"))]


@pytest.mark.parametrize("key", ["café$模型", "a\r\nSEED_RANK: 7", " spaces ", "UTF-8''x"])
async def test_any_key_travels_and_injects_nothing(key: str) -> None:
    planner = OldPlanner()
    async with serve(planner.app()) as url:
        client = PlannerClient(url)
        await client.announce(key, SEED)
        assert (await client.acquire(key)).seed == SEED
        with pytest.raises(NoSeedAvailable):
            await client.acquire(key + "x")
    assert planner.seen_headers[0]["SEED_RANK"] == "0"


async def test_the_spelling_that_works_is_remembered() -> None:
    requests = 0

    @web.middleware
    async def count(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        nonlocal requests
        requests += 1
        return await handler(request)

    app = HyphenPlanner().app()
    app.middlewares.append(count)
    async with serve(app) as url:
        client = PlannerClient(url)
        await client.announce(KEY, SEED)
        assert requests == 2
        await client.announce(KEY, SEED)
        lease = await client.acquire(KEY)
        await client.release(lease)
        assert requests == 5


async def test_a_refusal_that_the_spelling_does_not_cure_keeps_the_spelling() -> None:
    app, seen = scripted("/add_seed", 400, 400, 200)
    async with serve(app) as url:
        client = PlannerClient(url)
        with pytest.raises(PlannerError, match=r"400.*as the script says"):
            await client.announce(KEY, SEED)
        await client.announce(KEY, SEED)
    assert ["SEED_KEY" in request.headers for request in seen] == [True, False, True]


async def test_a_token_travels_on_every_call_and_in_no_message() -> None:
    app, seen = scripted("/add_seed", 401)
    async with serve(app) as url:
        with pytest.raises(PlannerError, match="401") as caught:
            await PlannerClient(url, token="s3cret").announce(KEY, SEED)
    assert seen[0].headers["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value)


async def test_a_password_in_the_url_is_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="vllm_rfork")
    async with raw_server(b"HTTP/1.1 yes OK\r\n\r\n") as garbled, raw_server(b"HTTP/1.1 500 no\r\n\r\n") as refusing:
        for url in (garbled, refusing, f"http://127.0.0.1:{free_port()}", "http://[::bad", "http://x y"):
            client = PlannerClient(url.replace("http://", "http://user:s3cret@"), sleep=Pauses())
            for call in (client.acquire(KEY), client.release(LEASE), client.healthz()):
                with pytest.raises(PlannerError) as caught:
                    await call
                assert "s3cret" not in str(caught.value)
    assert "s3cret" not in caplog.text


async def test_a_base_url_may_have_a_path_and_a_trailing_slash() -> None:
    app, seen = scripted("/fleet/a/add_seed", 200)
    async with serve(app) as url:
        await PlannerClient(url + "/fleet/a/").announce(KEY, SEED)
    assert len(seen) == 1


@pytest.mark.parametrize("host", ["10.0.{}.{}", "node-{}-{}." + "x" * 230])
async def test_the_excluded_seeds_fit_into_one_header_and_the_latest_stay(host: str) -> None:
    app, seen = scripted("/get_seed", 404, method="GET")
    failed = [SeedAddress(host.format(n // 256, n % 256), 8080, 0) for n in range(2000)]
    async with serve(app) as url:
        with pytest.raises(NoSeedAvailable):
            await PlannerClient(url).acquire(KEY, exclude=failed)
    sent = seen[0].headers["RFORK-EXCLUDE"].split(",")
    assert 20 < len(sent) <= 64
    assert sent == [str(seed) for seed in failed[-len(sent) :]]


async def test_a_granted_intent_is_told_with_the_miss() -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(
            status=404, headers={"RFORK-INTENT": "granted"} if "RFORK-INTENT" in request.headers else {}
        )

    app = web.Application()
    app.router.add_get("/get_seed", handle)
    async with serve(app) as url:
        with pytest.raises(NoSeedAvailable) as caught:
            await PlannerClient(url).acquire(KEY, intent="i1")
        assert caught.value.intent_granted
        with pytest.raises(NoSeedAvailable) as caught:
            await PlannerClient(url).acquire(KEY)
        assert not caught.value.intent_granted


async def test_intents_are_stated_and_taken_back() -> None:
    app, seen = scripted("/rfork_intent", 200)
    async with serve(app) as url:
        client = PlannerClient(url)
        assert await client.intend(KEY, "i1", ttl_s=600, fingerprint="f") is Outcome.DONE
        await client.intend(KEY, "i1", ttl_s=0)
    names = ("SEED_KEY", "RFORK-INTENT", "RFORK-INTENT-TTL-SEC", "RFORK-FINGERPRINT")
    assert [[request.headers.get(name) for name in names] for request in seen] == [
        [KEY, "i1", "600", "f"],
        [KEY, "i1", "0", None],
    ]


@pytest.mark.parametrize("character", ["x", "é", "模", "\U0001f600"])
async def test_a_seed_is_announced_however_long_its_differences_are(character: str) -> None:
    app, seen = scripted(messages.ADD_SEED, 200)
    async with serve(app) as url:
        await PlannerClient(url).announce(KEY, SEED, differs=character * 2000, parent="10.0.0.7:4711:0")
    assert seen[0].headers[messages.PARENT] == "10.0.0.7:4711:0"
    sent = messages.decode_text(seen[0].headers[messages.DIFFERS])
    assert set(sent) == {character}
    assert 500 < len(sent) <= messages.MAX_DIFFERS_LENGTH


async def test_a_seed_that_is_still_read_is_draining() -> None:
    app, _ = scripted("/remove_seed", 409)
    async with serve(app) as url:
        assert await PlannerClient(url).withdraw(KEY, SEED) is Outcome.DRAINING


async def test_a_beat_carries_the_state_id_of_the_last_answer_to_that_seed() -> None:
    seen: list[str | None] = []
    states = iter(["s1", "s1", None, "UTF-8''%FF", "s2", "x" * 7000, "s3"])

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("RFORK-STATE"))
        state = next(states)
        return web.Response(headers={} if state is None else {"RFORK-STATE": state})

    app = web.Application()
    app.router.add_post("/add_seed", handle)
    async with serve(app) as url:
        client = PlannerClient(url)
        for _ in range(6):
            await client.announce(KEY, SEED)
        await client.announce(KEY, SeedAddress("10.0.0.2", 8080, 0))
    assert seen == [None, "s1", "s1", None, None, "s2", None]


async def test_the_model_and_the_strategy_travel_where_the_planner_counts() -> None:
    seen: dict[str, tuple[str | None, str | None]] = {}

    async def handle(request: web.Request) -> web.Response:
        seen[request.path] = request.headers.get("RFORK-MODEL"), request.headers.get("RFORK-STRATEGY")
        return web.Response(status=404 if request.method == "GET" else 200)

    app = web.Application()
    app.router.add_route("*", "/{call}", handle)
    async with serve(app) as url:
        client = PlannerClient(url, model="/models/模" + "x" * 300, strategy="prod")
        await client.announce(KEY, SEED)
        await client.intend(KEY, "i1", ttl_s=1)
        for asking in (client.acquire(KEY), client.ask(KEY, "t1")):
            with pytest.raises(NoSeedAvailable):
                await asking
            assert seen.pop("/get_seed") == seen["/add_seed"]
        await client.withdraw(KEY, SEED)
    model, strategy = seen["/add_seed"]
    assert model is not None
    assert messages.decode_text(model) == "/models/模" + "x" * (255 - len("/models/模"))
    assert strategy == "prod"
    assert seen == {**dict.fromkeys(["/add_seed", "/rfork_intent"], (model, strategy)), "/remove_seed": (None, None)}


@pytest.mark.parametrize(
    ("text", "expected"), [("3,7000", Served(3, 7000)), (None, None), ("many", None), ("1,-1", None)]
)
async def test_an_announcement_returns_what_the_seed_has_served(text: str | None, expected: Served | None) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(headers={} if text is None else {"RFORK-SERVED": text})

    app = web.Application()
    app.router.add_post("/add_seed", handle)
    async with serve(app) as url:
        assert await PlannerClient(url).announce(KEY, SEED) == expected


@pytest.mark.parametrize(("text", "expected"), [("83.5", 83.5), (None, None), ("1e9", None), ("86401", None)])
async def test_a_lease_names_the_time_of_a_load_from_storage(text: str | None, expected: float | None) -> None:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(headers={**LEASE.headers(), **({} if text is None else {"RFORK-STORAGE-SEC": text})})

    app = web.Application()
    app.router.add_get("/get_seed", handle)
    async with serve(app) as url:
        assert (await PlannerClient(url).acquire(KEY)).storage_s == expected


@pytest.mark.parametrize("ends", ["the connection breaks", "a proxy answers", "no answer in time"])
async def test_a_seed_says_that_its_first_announcement_had_no_answer(ends: str) -> None:
    """The planner may have granted it meanwhile: the next one, which has no memory, must not take it for new."""
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("RFORK-STATE"))
        if len(seen) > 2:
            return web.Response(headers={"RFORK-STATE": "s1"})
        if ends == "a proxy answers":
            return web.Response(status=502)
        if ends == "no answer in time":
            await asyncio.sleep(30)
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    app = web.Application()
    app.router.add_post("/add_seed", handle)
    async with serve(app) as url:
        client = PlannerClient(url, request_timeout_s=0.5 if ends == "no answer in time" else 10.0)
        for _ in range(2):
            with pytest.raises(PlannerError):
                await client.announce(KEY, SEED)
        client.request_timeout_s = 10.0
        await client.announce(KEY, SEED)
        await client.announce(KEY, SEED)
    assert seen == [None, "unanswered", "unanswered", "s1"]


async def test_a_planner_that_was_not_reached_knows_nothing_of_the_seed() -> None:
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("RFORK-STATE"))
        return web.Response(status=503) if len(seen) == 1 else web.Response()

    app = web.Application()
    app.router.add_post("/add_seed", handle)
    async with serve(app) as url:
        client = PlannerClient(url)
        client.urls = ("http://127.0.0.1:1",)
        with pytest.raises(PlannerError):
            await client.announce(KEY, SEED)
        client.urls = (url,)
        with pytest.raises(PlannerError):
            await client.announce(KEY, SEED)
        await client.announce(KEY, SEED)
    assert seen == [None, None]


@pytest.mark.parametrize(
    "planner", [OldPlanner(), ProductionPlanner(), HyphenPlanner()], ids=lambda each: type(each).__name__
)
async def test_a_planner_without_a_call_for_caches_has_no_seed_with_caches(planner: Any) -> None:
    async with serve(planner.app()) as url:
        client = PlannerClient(url)
        await client.announce(KEY, SEED, caches="torch_aot=hit;saved=38.2")
        assert await client.find_seed(KEY) is None


@pytest.mark.parametrize("status", [200, 401, 500])
async def test_an_answer_that_names_no_seed_is_an_error(status: int) -> None:
    app, _ = scripted("/rfork_find_seed", status, method="GET")
    async with serve(app) as url:
        with pytest.raises(PlannerError):
            await PlannerClient(url).find_seed(KEY)


# --- retries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
async def test_a_release_is_tried_again_until_the_planner_has_time(status: int) -> None:
    app, seen = scripted("/put_seed", status, status, 200)
    pauses = Pauses()
    async with serve(app) as url:
        assert await PlannerClient(url, sleep=pauses).release(LEASE) is Outcome.DONE
    assert len(seen) == 3
    assert pauses.asked_s == sorted(pauses.asked_s)
    assert len(pauses.asked_s) == 2


@pytest.mark.parametrize("status", [200, 404, 400])
async def test_a_lease_that_is_gone_is_released_without_another_try(status: int) -> None:
    app, _ = scripted("/put_seed", status)
    pauses = Pauses()
    async with serve(app) as url:
        await PlannerClient(url, sleep=pauses).release(LEASE)
    assert pauses.asked_s == []


async def test_a_refusal_is_not_tried_again() -> None:
    app, seen = scripted("/put_seed", 403)
    async with serve(app) as url:
        with pytest.raises(PlannerError, match="403"):
            await PlannerClient(url, sleep=Pauses()).release(LEASE)
    assert len(seen) == 1


async def test_releasing_gives_up_after_a_bounded_number_of_tries() -> None:
    pauses = Pauses()
    with pytest.raises(PlannerError, match="put_seed"):
        await PlannerClient(f"http://127.0.0.1:{free_port()}", sleep=pauses).release(LEASE)
    assert 1 < len(pauses.asked_s) < 10

    app, seen = scripted("/put_seed", 503)
    async with serve(app) as url:
        with pytest.raises(PlannerError, match="503"):
            await PlannerClient(url, sleep=Pauses()).release(LEASE)
    assert len(seen) == len(pauses.asked_s) + 1


async def test_a_release_says_how_the_fork_went() -> None:
    app, seen = scripted("/put_seed", 200)
    async with serve(app) as url:
        await PlannerClient(url).release(LEASE, result="failed", nbytes=7, seconds=1.25, cause="SeedError")
    names = ("RFORK-RESULT", "RFORK-NBYTES", "RFORK-SECONDS", "RFORK-CAUSE")
    assert [seen[0].headers[name] for name in names] == ["failed", "7", "1.25", "SeedError"]


async def test_a_withdrawal_survives_a_hiccup() -> None:
    app, seen = scripted("/remove_seed", 502, 200)
    async with serve(app) as url:
        assert await PlannerClient(url, sleep=Pauses()).withdraw(KEY, SEED) is Outcome.DONE
    assert len(seen) == 2


# --- not a planner ------------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
LEASE_HEADERS = b"SEED_IP: 10.0.0.1\r\nSEED_PORT: 80\r\nSEED_RANK: 0\r\nUSER_ID: u1\r\n"
NONSENSE = {
    "silence": b"",
    "not HTTP": b"\x00\x01\x02\xff" * 100,
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "no headers": OK + b"Content-Length: 0\r\n\r\n",
    "port is text": OK + b"SEED_IP: h\r\nSEED_PORT: many\r\nSEED_RANK: 0\r\nUSER_ID: u\r\nContent-Length: 0\r\n\r\n",
    "host is a path": OK + b"SEED_IP: h/x?y\r\nSEED_PORT: 1\r\nSEED_RANK: 0\r\nUSER_ID: u\r\nContent-Length: 0\r\n\r\n",
    "ttl is text": OK + LEASE_HEADERS + b"LEASE_TTL_SEC: soon\r\nContent-Length: 0\r\n\r\n",
    "ttl is negative": OK + LEASE_HEADERS + b"LEASE_TTL_SEC: -5\r\nContent-Length: 0\r\n\r\n",
    "ttl is nan": OK + LEASE_HEADERS + b"LEASE_TTL_SEC: nan\r\nContent-Length: 0\r\n\r\n",
    "user id not UTF-8": OK + LEASE_HEADERS.replace(b"u1", b"UTF-8''%FF%80") + b"Content-Length: 0\r\n\r\n",
    "huge header": OK + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "many headers": OK + b"".join(b"X%d: y\r\n" % n for n in range(50_000)) + b"\r\n",
    "header without colon": OK + b"nonsense\r\n\r\n",
    "bad content length": OK + b"Content-Length: -3\r\n\r\n",
    "contradicting lengths": OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "status is text": b"HTTP/1.1 yes OK\r\n\r\n",
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/get_seed\r\nContent-Length: 0\r\n\r\n",
    "server error": b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\noops",
    "refusal that breaks off": b"HTTP/1.1 503 Busy\r\nContent-Length: 400\r\n\r\nbus",
    "endless refusal": b"HTTP/1.1 503 Busy\r\n\r\n" + b"no " * 100_000,
    "broken chunks": b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxx",
    "other protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
}


@pytest.mark.parametrize("reply", list(NONSENSE.values()), ids=list(NONSENSE))
async def test_nonsense_is_a_planner_error(reply: bytes) -> None:
    async with raw_server(reply) as url:
        client = PlannerClient(url, request_timeout_s=TEST_LIMIT_S)
        with pytest.raises(PlannerError) as caught:
            await client.acquire(KEY)
    assert len(str(caught.value)) < 1000


JSON_NONSENSE = {
    "not JSON": b"<html>",
    "a list": b"[]",
    "too deep": b'{"a":' * 100_000,
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("body", list(JSON_NONSENSE.values()), ids=list(JSON_NONSENSE))
async def test_a_snapshot_that_is_no_object_is_a_planner_error(body: bytes) -> None:
    async with raw_server(OK + b"Content-Length: %d\r\n\r\n" % len(body) + body) as url:
        client = PlannerClient(url, request_timeout_s=TEST_LIMIT_S)
        with pytest.raises(PlannerError, match="JSON"):
            await client.snapshot()


async def test_an_answer_lies_in_its_headers_and_waits_for_no_body() -> None:
    async with raw_server(OK + LEASE_HEADERS + b"Content-Length: 100\r\n\r\n", then="hang") as url:
        lease = await PlannerClient(url, request_timeout_s=TEST_LIMIT_S).acquire(KEY)
    assert lease == Lease(SeedAddress("10.0.0.1", 80, 0), "u1", None)


async def test_a_refusal_is_known_though_its_text_never_comes() -> None:
    async with raw_server(b"HTTP/1.1 404 No\r\nContent-Length: 100\r\n\r\n", then="hang") as url:
        with pytest.raises(NoSeedAvailable):
            await PlannerClient(url, request_timeout_s=TEST_LIMIT_S).acquire(KEY)


HANGS: dict[str, dict[str, Any]] = {
    "never answers": {"reply": b"", "then": "hang"},
    "stops in the headers": {"reply": OK + b"SEED_IP: 10", "then": "hang"},
    "dribbles": {"reply": OK + b"X: " + b"a" * 8000, "chunk_pause_s": 0.02},
    "endless interim answers": {"reply": b"HTTP/1.1 100 Continue\r\n\r\n", "then": "endless"},
}


@pytest.mark.parametrize("behaviour", list(HANGS.values()), ids=list(HANGS))
@pytest.mark.parametrize("call", ["acquire", "renew", "announce", "withdraw", "intend", "healthz", "snapshot"])
async def test_every_call_is_bounded_in_total(behaviour: dict[str, Any], call: str) -> None:
    async with raw_server(**behaviour) as url:
        client = PlannerClient(url, request_timeout_s=0.3)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "acquire": lambda: client.acquire(KEY, wait_s=0.1),
            "renew": lambda: client.renew(LEASE),
            "announce": lambda: client.announce(KEY, SEED),
            "withdraw": lambda: client.withdraw(KEY, SEED),
            "intend": lambda: client.intend(KEY, "i", ttl_s=5),
            "healthz": client.healthz,
            "snapshot": client.snapshot,
        }
        # Without a bound of its own the call would run into this one.
        with pytest.raises(PlannerError, match="planner http://127"):
            await asyncio.wait_for(calls[call](), TEST_LIMIT_S)


async def test_a_body_that_never_ends_is_cut_off_in_bytes_and_in_time() -> None:
    async with raw_server(OK + b"\r\n" + b" " * 65536, then="endless") as url:
        with pytest.raises(PlannerError, match=r"bytes|within"):
            await asyncio.wait_for(PlannerClient(url, request_timeout_s=5).snapshot(), TEST_LIMIT_S)


async def test_endless_headers_of_an_answer_end_the_call() -> None:
    """aiohttp before 3.14.2 kept them all, until the call's bound in time."""
    taken_nbytes = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken_nbytes
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"X: y\r\n" * 10_000)
                await writer.drain()
                taken_nbytes += 60_000
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(PlannerError, match="failed"):  # not: no answer within
        await PlannerClient(url, request_timeout_s=60).acquire(KEY)
    server.close()
    assert taken_nbytes < 16_000_000  # the kernel's buffers


async def test_waiting_for_a_seed_extends_the_bound_by_the_wait() -> None:
    async def handle(request: web.Request) -> web.Response:
        assert request.headers["RFORK-WAIT-SEC"] == "5"
        await asyncio.sleep(0.4)  # longer than a call without waiting may take
        raise web.HTTPNotFound

    app = web.Application()
    app.router.add_get("/get_seed", handle)
    async with serve(app) as url:
        with pytest.raises(NoSeedAvailable):
            await PlannerClient(url, request_timeout_s=0.2).acquire(KEY, wait_s=5)


async def test_the_second_spelling_shares_the_bound_of_the_first() -> None:
    calls = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.3 if calls == 1 else TEST_LIMIT_S)
        raise web.HTTPBadRequest

    app = web.Application()
    app.router.add_post("/add_seed", handle)
    async with serve(app) as url:
        with pytest.raises(PlannerError, match=r"within [0-2]\.") as caught:  # what is left
            await PlannerClient(url, request_timeout_s=3.0).announce(KEY, SEED)
    assert calls == 2, caught.value


async def test_a_redirect_is_a_refusal_and_not_followed() -> None:
    target, seen = scripted("/get_seed", 200, method="GET")
    async with serve(target) as url:
        reply = f"HTTP/1.1 307 Moved\r\nLocation: {url}/get_seed\r\nContent-Length: 0\r\n\r\n".encode()
        async with raw_server(reply) as redirecting:
            with pytest.raises(PlannerError, match="307"):
                await PlannerClient(redirecting, token="s3cret").acquire(KEY)
    assert seen == []


async def test_a_token_that_no_header_can_carry_is_a_planner_error() -> None:
    app, seen = scripted("/get_seed", 404, method="GET")
    async with serve(app) as url:
        with pytest.raises(PlannerError) as caught:
            await PlannerClient(url, token="s3cret\nSEED_KEY: x").acquire(KEY)
    assert seen == []
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://", "no url", "http://[::bad", "ftp://h/", "http://a b/", "http://x\n.y/", "", f"http://{'a' * 70}.b/"],
)
async def test_an_address_that_is_none_is_a_planner_error(url: str) -> None:
    with pytest.raises(PlannerError):
        await PlannerClient(url, request_timeout_s=TEST_LIMIT_S).acquire(KEY)


async def test_a_key_that_no_header_can_carry_is_refused_before_it_is_sent() -> None:
    app, seen = scripted("/get_seed", 404, method="GET")
    async with serve(app) as url:
        with pytest.raises(PlannerError, match=r"SEED_KEY.*long"):
            await PlannerClient(url).acquire("模" * 2000)
    assert seen == []


async def test_the_lease_in_an_unusable_answer_is_given_back() -> None:
    class Garbled(OldPlanner):
        def answer(self, seed: tuple[str, str, str], user_id: str) -> dict[str, str]:
            return {**super().answer(seed, user_id), "LEASE_TTL_SEC": "soon"}

    planner = Garbled()
    async with serve(planner.app()) as url:
        client = PlannerClient(url)
        await client.announce(KEY, SEED)
        with pytest.raises(PlannerError, match="LEASE_TTL_SEC"):
            await client.acquire(KEY)
    assert planner.granted == 1
    assert planner.leases == {}


async def test_a_header_in_the_callers_text_cannot_break_out() -> None:
    planner = OldPlanner()
    async with serve(planner.app()) as url:
        await PlannerClient(url).announce(KEY, SEED, labels="host=a\r\nSEED_RANK: 9", epoch="\x00", intent="ü")
    assert planner.seeds == {("10.0.0.1", "8080", "0"): KEY}


async def test_after_calls_no_connection_stays_open() -> None:
    open_connections: set[object] = set()

    async def handle(request: web.Request) -> web.Response:
        open_connections.add(request.transport)
        assert request.headers["Connection"] == "close"
        return web.Response()

    app = web.Application()
    app.router.add_post("/add_seed", handle)
    async with serve(app) as url:
        client = PlannerClient(url)
        for _ in range(3):
            await client.announce(KEY, SEED)
    assert len(open_connections) == 3  # one each, none reused


# --- planners that are away for a moment ------------------------------------------------------------------------------


class Time:
    """A clock that sleeping moves, and what ``get_seed`` is answered with at which second."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.paused_s: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        self.paused_s.append(delay_s)
        self.now += delay_s

    def client(self, url: str, request_timeout_s: float = 10.0, jitter: float = 0.0) -> PlannerClient:
        return PlannerClient(
            url, request_timeout_s=request_timeout_s, sleep=self.sleep, clock=self, jitter=lambda: jitter
        )


def busy(*answers: tuple[int, str | None]) -> tuple[web.Application, list[web.Request]]:
    """A planner that answers ``get_seed`` with each status and ``Retry-After`` in turn, and then the last for ever."""
    seen: list[web.Request] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request)
        status, retry_after = answers[min(len(seen), len(answers)) - 1]
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        if status == 200:
            headers |= {"SEED_IP": "10.0.0.1", "SEED_PORT": "8080", "SEED_RANK": "0", "USER_ID": "u1"}
        return web.Response(status=status, headers=headers, text="the planner is being stopped")

    app = web.Application()
    app.router.add_get("/get_seed", handle)
    return app, seen


async def test_a_planner_that_asks_for_patience_is_asked_again_when_it_said() -> None:
    app, seen = busy((503, "1"), (429, "3"), (200, None))
    passing = Time()
    async with serve(app) as url:
        assert (await passing.client(url).acquire(KEY)).seed == SEED
    assert passing.paused_s == [1.0, 3.0]
    assert len(seen) == 3


async def test_those_who_were_sent_away_together_do_not_come_back_together() -> None:
    app, _ = busy((503, "2"), (200, None))
    passing = Time()
    async with serve(app) as url:
        await passing.client(url, jitter=1.0).acquire(KEY)
    assert passing.paused_s == [3.0]


@pytest.mark.parametrize("wait_s", [0.0, 60.0])
@pytest.mark.parametrize("retry_after", ["0", "1", "4"])
async def test_patience_ends_with_the_bound_of_the_call(wait_s: float, retry_after: str) -> None:
    app, _ = busy((503, retry_after))
    passing = Time()
    async with serve(app) as url:
        # The last question has what is left of the bound, 0.1 s after "0", in which a busy machine may not answer.
        with pytest.raises(PlannerError, match=r"503|no answer within 0\.1 s"):
            await passing.client(url).acquire(KEY, wait_s=wait_s)
    assert 10 + wait_s - 4 <= passing.now - 1000 < 10 + wait_s


async def test_a_planner_that_wants_more_patience_than_there_is_is_not_waited_for() -> None:
    app, seen = busy((503, "3600"))
    passing = Time()
    async with serve(app) as url:
        with pytest.raises(PlannerError, match="503"):
            await passing.client(url).acquire(KEY, wait_s=60)
    assert (passing.paused_s, len(seen)) == ([], 1)


@pytest.mark.parametrize(
    ("status", "retry_after"),
    [(503, None), (503, "soon"), (503, "-1"), (503, "1e3"), (500, "1"), (401, "1"), (302, "1")],
)
async def test_no_other_refusal_is_asked_again(status: int, retry_after: str | None) -> None:
    app, seen = busy((status, retry_after))
    passing = Time()
    async with serve(app) as url:
        with pytest.raises(PlannerError, match=str(status)):
            await passing.client(url).acquire(KEY, wait_s=60)
    assert (passing.paused_s, len(seen)) == ([], 1)


async def test_what_is_left_of_the_wait_is_asked_for_the_next_time() -> None:
    app, seen = busy((503, "30"), (503, "50"), (404, None))
    passing = Time()
    async with serve(app) as url:
        with pytest.raises(NoSeedAvailable):
            await passing.client(url, request_timeout_s=30.0).acquire(KEY, wait_s=60, intent="i1")
    assert [request.headers.get("RFORK-WAIT-SEC") for request in seen] == ["60", "30", None]
    assert {request.headers["RFORK-INTENT"] for request in seen} == {"i1"}


async def test_a_planner_that_dies_under_a_waiting_receiver_is_asked_again_once_it_is_back() -> None:
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        if connections == 3:
            writer.write(
                b"HTTP/1.1 200 OK\r\nSEED_IP: 10.0.0.1\r\nSEED_PORT: 8080\r\nSEED_RANK: 0\r\nUSER_ID: u\r\n"
                b"Content-Length: 0\r\n\r\n"
            )
        writer.close()

    passing = Time()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert (await passing.client(url).acquire(KEY, wait_s=60)).seed == SEED
    assert set(passing.paused_s) == {1.0}


async def test_a_planner_that_nobody_can_reach_costs_one_request_timeout_however_long_the_wait() -> None:
    passing = Time()
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(PlannerError):
        await passing.client(url).acquire(KEY, wait_s=600)
    assert passing.now - 1000 <= 10
    with pytest.raises(PlannerError):
        await passing.client(url).acquire(KEY)
    assert passing.now - 1000 <= 10, "a receiver that does not wait is not made to"


@pytest.mark.parametrize(("wait_s", "asks_again"), [(None, False), (0.0, False), (60.0, True)])
async def test_a_refused_first_question_is_repeated_only_if_the_worker_states_a_wait(
    wait_s: float | None, asks_again: bool
) -> None:
    """docs/planner.md: a planner that is gone delays no start, and a restart of the only one costs some forks."""
    passing = Time()
    with pytest.raises(PlannerError):
        await passing.client(f"http://127.0.0.1:{free_port()}").ask(KEY, "a-ticket", wait_s=wait_s)
    assert bool(passing.paused_s) is asks_again


async def test_a_planner_that_drains_and_one_that_comes_after_it_serve_a_waiting_receiver() -> None:
    """The real one: it sends a waiting receiver away, and is gone; its successor has the seed."""
    port = free_port()
    first = PlannerUnderTest("--trust-announced-address", "--drain-sec", "2", port=port).until_ready()
    client = PlannerClient(first.url, request_timeout_s=TEST_LIMIT_S)
    await client.intend(KEY, "somebody", ttl_s=60)
    waiting = asyncio.create_task(client.acquire(KEY, wait_s=TEST_LIMIT_S, intent="i1"))
    second: PlannerUnderTest | None = None
    try:
        await until_waiting(client)
        assert await asyncio.to_thread(first.stop) == 0
        assert not waiting.done(), "it must not give up while there is time"
        second = await asyncio.to_thread(PlannerUnderTest("--trust-announced-address", port=port).until_ready)
        await client.announce(KEY, SEED)
        assert (await asyncio.wait_for(waiting, TEST_LIMIT_S)).seed == SEED
    finally:
        waiting.cancel()
        first.kill()
        if second is not None:
            second.stop()


async def until_waiting(client: PlannerClient) -> None:
    for _ in range(1000):
        if (await client.snapshot())["waiting"]:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("nobody ever stood in line")
