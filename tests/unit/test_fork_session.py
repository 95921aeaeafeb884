"""What a starting worker tells its planner: where it stands, that it will be a seed, and that it will be none."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
import types
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from torch import nn

from tests.sockets import deaf
from tests.unit.interop_planners import free_port, serve
from vllm_rfork.clients import PlannerClient
from vllm_rfork.config import Settings, parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.errors import ConfigError, EngineError, ForkError, NoSeedAvailable, SeedError
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.load.outcome import _seed_config
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net import advertise
from vllm_rfork.net.advertise import advertise_host
from vllm_rfork.planner.app import PlannerProcess
from vllm_rfork.planner.http.auth import Tokens
from vllm_rfork.planner.settings import settings_from

KEY = "/models/q$prod$kv_both$0$0"
WITHIN_S = 60.0


def settings(url: str, **more: Any) -> Settings:
    return parse_config({"rfork_scheduler_url": url, "rfork_request_timeout_sec": 5.0, **more}, {}).settings


def session_at(url: str, **more: Any) -> ForkSession:
    return ForkSession(settings(url, **more), KEY, EngineSet(["memory"], EngineConfig(device="cpu")))


@contextlib.asynccontextmanager
async def planner() -> AsyncIterator[PlannerClient]:
    process = PlannerProcess(settings_from({"port": 0}), tokens=Tokens(None, {}))
    async with process.running():
        yield PlannerClient(process.url)


async def ask(session: ForkSession) -> None:
    with pytest.raises(NoSeedAvailable):
        await asyncio.to_thread(session.reserve, "f1")


async def intents(client: PlannerClient) -> list[Any]:
    found: list[Any] = (await client.snapshot())["intents"]
    return found


async def leases(client: PlannerClient) -> list[Any]:
    found: list[Any] = (await client.snapshot())["leases"]
    return found


# --- the time of a fork ----------------------------------------------------------------------------------------------


def test_a_fork_has_its_time_and_then_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its reservation on, on the clock; what checks and sets the seed's state asks for what is left."""
    session = session_at("http://127.0.0.1:1", rfork_fork_timeout_sec=20.0)
    now = 1000.0
    monkeypatch.setattr("vllm_rfork.fork.session.time.monotonic", lambda: now)
    monkeypatch.setattr(session.engines, "await_one", lambda: None)
    held = types.SimpleNamespace(seed=SeedAddress("10.0.0.7", 4711, 0))
    monkeypatch.setattr(session, "_acquire", lambda fingerprint: held)
    assert session.reserve("f1") == held.seed
    assert session.left_s() == 20.0
    now += 19.0
    assert session.left_s() == 1.0
    now += 1.0
    with pytest.raises(ForkError, match=r"took longer than 20 s \(rfork_fork_timeout_sec\)"):
        session.left_s()


# --- what a seed keeps of its fork ------------------------------------------------------------------------------------


def test_a_fork_that_succeeds_refers_to_nothing_that_an_earlier_attempt_used(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_at("http://127.0.0.1:1")
    held = types.SimpleNamespace(seed=SeedAddress("10.0.0.7", 4711, 0))
    monkeypatch.setattr(session.engines, "await_one", lambda: None)
    monkeypatch.setattr(session, "_acquire", lambda fingerprint: held)
    monkeypatch.setattr(session.leases, "release", lambda *lease: None)
    failures = [SeedError("it has died")]

    def fork_once(held: Any, destination: Any, usage: Any) -> Any:
        if failures:
            raise failures.pop()
        return types.SimpleNamespace(nbytes=1)

    monkeypatch.setattr(session, "_fork_once", fork_once)
    target: Any = types.SimpleNamespace(local=types.SimpleNamespace(fingerprint="f1"))
    model = target.memory = nn.Linear(1, 1)
    session.run(target)
    kept = weakref.ref(model)
    del target, model
    gc.collect()
    assert kept() is None


def test_a_seed_keeps_no_fork_session() -> None:
    session = session_at("http://127.0.0.1:1")
    identity = types.SimpleNamespace(tp_rank=0, local_rank=0, is_draft=False)
    context: Any = types.SimpleNamespace(settings=session.settings, identity=identity)
    session.seed = SeedAddress("10.0.0.7", 4711, 0)
    session.others._text = "dtype: bfloat16 here, float16 on 1 seed"
    config = _seed_config(context, session, "127.0.0.1")
    kept = weakref.ref(session)
    session.close()
    del session
    gc.collect()
    assert (config.parent, config.differs()) == ("10.0.0.7:4711:0", "dtype: bfloat16 here, float16 on 1 seed")
    assert kept() is None


# --- engines and leases -----------------------------------------------------------------------------------------------


async def test_a_lease_is_given_back_unused_when_no_engine_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken while they were opening; the seed is not to blame, and the next receiver may have it."""
    seed = SeedAddress("127.0.0.1", 7000, 0)
    async with planner() as client:
        await client.announce(KEY, seed, fingerprint="f1")
        session = session_at(client.urls[0])
        await asyncio.to_thread(session.reserve, "f1")
        assert len(await leases(client)) == 1, "the planner was asked before any engine was open"

        def none_opens() -> None:
            raise EngineError("memory", "open", "not today")

        monkeypatch.setattr(session.engines, "await_one", none_opens)
        with pytest.raises(EngineError, match="not today"):
            await asyncio.to_thread(session.await_engine)
        deadline = time.monotonic() + WITHIN_S
        while await leases(client):
            assert time.monotonic() < deadline, "the lease is not given back"
            await asyncio.sleep(0.01)
        assert (await client.acquire(KEY, fingerprint="f1")).seed == seed
        await asyncio.to_thread(session.close)


# --- intents ---------------------------------------------------------------------------------------------------------


async def test_who_waits_for_a_worker_that_will_be_no_seed_is_told_at_once() -> None:
    async with planner() as client:
        session = session_at(client.urls[0])
        await ask(session)
        waiting = asyncio.create_task(client.acquire(KEY, fingerprint="f1", wait_s=600, intent="another"))
        while not (await client.snapshot())["waiting"]:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(session.close)
        with pytest.raises(NoSeedAvailable) as told:
            await asyncio.wait_for(waiting, WITHIN_S)
        assert told.value.intent_granted, "now that one is waited for"
        await asyncio.to_thread(session.close)


async def test_a_worker_that_becomes_a_seed_takes_nothing_back() -> None:
    """Its announcement fulfils the intent, and until then others wait."""
    async with planner() as client:
        session = session_at(client.urls[0])
        await ask(session)
        await asyncio.to_thread(session.intent.stop_renewing)
        assert len(await intents(client)) == 1
        await client.announce(KEY, SeedAddress("127.0.0.1", 7000, 0), fingerprint="f1", intent=session.intent.id)
        assert await intents(client) == []
        session.engines.close()


@pytest.mark.parametrize("when", ["told not to", "found out before it asks"])
async def test_a_worker_that_will_be_no_seed_states_no_intent(when: str) -> None:
    async with planner() as client:
        session = session_at(client.urls[0], rfork_become_seed=when != "told not to")
        if when != "told not to":
            await asyncio.to_thread(session.intent.withdraw)
        await ask(session)
        assert await intents(client) == []
        await asyncio.to_thread(session.close)


async def test_an_intent_that_may_have_been_heard_is_taken_back_as_well() -> None:
    """The planner hangs up without a word: nobody knows what it remembers."""
    calls: list[tuple[str, str | None]] = []

    async def handle(request: web.Request) -> web.Response:
        calls.append((request.path, request.headers.get("RFORK-INTENT-TTL-SEC")))
        if request.path == "/get_seed":
            return web.Response(status=500)
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{any}", handle)
    async with serve(app) as url:
        session = session_at(url)
        with pytest.raises(Exception, match="500"):
            await asyncio.to_thread(session.reserve, "f1")
        await asyncio.to_thread(session.close)
    assert calls == [("/get_seed", None), ("/rfork_intent", "0")]


async def test_planners_that_keep_no_intents_are_not_bothered() -> None:
    calls: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        calls.append(request.path)
        return web.Response(status=404)

    app = web.Application()
    app.router.add_route("*", "/{any}", handle)
    async with serve(app) as url:
        session = session_at(url)
        await ask(session)
        await asyncio.to_thread(session.close)
    assert calls == ["/get_seed"]


# --- where it stands -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "hostname", "sent"),
    [
        ("", "node-1", "host=node-1"),
        ("rack=b", "node-1.example.org", "host=node-1.example.org,rack=b"),
        ("host=a,rack=b", "node-1", "host=a,rack=b"),
        ("localhost=x", "node-1", "host=node-1,localhost=x"),
        ("rack=b", "localhost", "rack=b"),
        ("rack=b", "localhost.localdomain", "rack=b"),
        ("rack=b", "no host", "rack=b"),
        ("rack=b", "a" * 64, "rack=b"),
        ("rack=b", "", "rack=b"),
    ],
)
def test_the_hostname_is_the_host_where_no_label_says_otherwise(given: str, hostname: str, sent: str) -> None:
    assert settings("http://p", rfork_labels=given).labels(hostname) == sent


async def test_a_receiver_says_where_it_stands_when_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request.headers.get("RFORK-LABELS"))
        return web.Response(status=404)

    app = web.Application()
    app.router.add_get("/get_seed", handle)
    async with serve(app) as url:
        session = session_at(url, rfork_labels="rack=b", rfork_become_seed=False)
        await ask(session)
        await asyncio.to_thread(session.close)
    assert seen == ["host=node-7,rack=b"]


def test_secrets_that_cannot_be_read_fail_the_start_by_name() -> None:
    with pytest.raises(ConfigError, match="rfork_token_file"):
        session_at("http://planner:1", rfork_token_file="/nowhere/token")


# --- its own address -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_host_ip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_HOST_IP", raising=False)


def test_the_option_wins_and_a_loopback_address_for_a_planner_elsewhere_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.2")
    assert advertise_host(settings("http://10.0.0.9:1", rfork_seed_advertise_host="10.0.0.1")) == "10.0.0.1"
    assert advertise_host(settings("http://127.0.0.1:1", rfork_seed_advertise_host="127.0.0.1")) == "127.0.0.1"
    assert caplog.records == []
    assert advertise_host(settings("http://10.0.0.9:1", rfork_seed_advertise_host="localhost")) == "localhost"
    assert "no other machine can fork" in caplog.text


def test_vllms_own_address_is_taken_unless_it_is_this_machines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.2")
    assert advertise_host(settings("http://10.0.0.9:1")) == "10.0.0.2"
    route(monkeypatch, "10.0.0.3")
    for loopback in ("127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost"):
        monkeypatch.setenv("VLLM_HOST_IP", loopback)
        assert advertise_host(settings("http://10.0.0.9:1")) == "10.0.0.3"


@pytest.mark.parametrize("unspecified", ["0.0.0.0", "::", "0", "[::]", "0x0"])
def test_an_address_that_is_every_address_is_never_announced(
    unspecified: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    route(monkeypatch, "10.0.0.3")
    monkeypatch.setenv("VLLM_HOST_IP", unspecified)
    assert advertise_host(settings("http://10.0.0.9:1")) == "10.0.0.3"
    for part in ("VLLM_HOST_IP", unspecified, "rfork_seed_advertise_host"):
        assert part in caplog.text
    with pytest.raises(ConfigError, match="rfork_seed_advertise_host"):
        advertise_host(settings("http://10.0.0.9:1", rfork_seed_advertise_host=unspecified))


def test_a_loopback_host_ip_is_warned_of_only_where_the_planner_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    assert advertise_host(settings(f"http://127.0.0.1:{free_port()}")) == "127.0.0.1"
    assert caplog.records == []
    route(monkeypatch, "10.0.0.3")
    assert advertise_host(settings("http://10.0.0.9:1")) == "10.0.0.3"
    assert "VLLM_HOST_IP" in caplog.text


def test_the_address_is_that_of_the_connection_that_reached_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """``localhost`` is ::1 first in many /etc/hosts, while the planner listens on 127.0.0.1 alone, or the reverse."""
    with socket.create_server(("127.0.0.1", 0)) as planner:
        port = planner.getsockname()[1]
        names = [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)),
        ]
        monkeypatch.setattr(advertise.socket, "getaddrinfo", lambda *_, **__: names)
        assert advertise_host(settings(f"http://localhost:{port}")) == "127.0.0.1"
    # Nobody listens yet: the route to the first address.
    assert advertise.is_loopback(advertise_host(settings(f"http://localhost:{port}")) or "")


def test_of_several_planners_the_first_whose_name_is_found_shows_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is scaled away has no name any more."""

    def names(host: str, port: int, **_: object) -> list[object]:
        if host == "gone.example":
            raise OSError("Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(advertise.socket, "getaddrinfo", names)
    with socket.create_server(("127.0.0.1", 0)) as planner:
        port = planner.getsockname()[1]
        assert advertise_host(settings(f"http://gone.example,http://here.example:{port}")) == "127.0.0.1"
    assert advertise_host(settings("http://gone.example,http://gone.example:2")) is None


def test_lookups_of_several_planners_together_are_bounded_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advertise.socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    urls = ",".join(f"http://h{number}" for number in range(8))
    started_at = time.monotonic()
    with pytest.raises(TimeoutError, match="rfork_request_timeout_sec"):
        advertise_host(settings(urls, rfork_request_timeout_sec=0.4))
    assert time.monotonic() - started_at < 2


def test_a_planner_that_takes_no_connection_costs_a_start_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advertise, "_CONNECT_TIMEOUT_S", 0.05)
    with deaf() as url:
        assert advertise_host(settings(url)) == "127.0.0.1"


def test_a_planner_on_loopback_is_reached_from_loopback() -> None:
    for host in ("127.0.0.1", "localhost"):
        assert advertise.is_loopback(advertise_host(settings(f"http://{host}:{free_port()}")) or "")


def test_without_a_route_no_address_is_made_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    route(monkeypatch, OSError("Network is unreachable"))
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    assert advertise_host(settings("http://10.0.0.9:1")) is None
    assert "Network is unreachable" in caplog.text


def route(monkeypatch: pytest.MonkeyPatch, way: str | OSError) -> None:
    """Let the way to the planner begin at an address, or end in an error."""

    class Probe:
        def __init__(self, *args: object) -> None: ...
        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *args: object) -> None: ...
        def settimeout(self, seconds: float) -> None: ...
        def connect(self, address: object) -> None:
            if isinstance(way, OSError):
                raise way

        def getsockname(self) -> tuple[str, int]:
            return str(way), 1

    monkeypatch.setattr(advertise.socket, "socket", Probe)
