"""A planner with several addresses: which of them a call reaches, and what the others cost."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from tests.unit.interop_planners import free_port, raw_server, serve
from vllm_rfork.clients import Attendance, Outcome, PlannerClient
from vllm_rfork.errors import NoSeedAvailable, PlannerError
from vllm_rfork.messages import Lease, SeedAddress

KEY = "/models/q$prod$kv_both$0$0"
SEED = SeedAddress("10.0.0.1", 8080, 0)
LEASE = Lease(SEED, "u1", 60.0)
GRANTED = {"SEED_IP": "10.0.0.1", "SEED_PORT": "8080", "SEED_RANK": "0", "USER_ID": "u1"}


class Replica:
    """Answers every call with ``status``; keeps the requests."""

    def __init__(self, status: int = 200, retry_after: str = "1") -> None:
        self.status = status
        self.retry_after = retry_after
        self.seen: list[web.Request] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.seen.append(request)
        headers = dict(GRANTED) if self.status == 200 else {}
        if self.status == 503 and self.retry_after:
            headers["Retry-After"] = self.retry_after
        return web.json_response({"status": "ok"}, status=self.status, headers=headers)


@contextlib.asynccontextmanager
async def replicas(*made: Replica) -> AsyncIterator[str]:
    async with contextlib.AsyncExitStack() as stack:
        for replica in made:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", replica.handle)
            replica.url = await stack.enter_async_context(serve(app))
        yield ",".join(replica.url for replica in made)


CALLS: dict[str, Callable[[PlannerClient], Awaitable[object]]] = {
    "acquire": lambda client: client.acquire(KEY),
    "ask": lambda client: client.ask(KEY, "t1"),
    "renew": lambda client: client.renew(LEASE),
    "release": lambda client: client.release(LEASE),
    "announce": lambda client: client.announce(KEY, SEED),
    "withdraw": lambda client: client.withdraw(KEY, SEED),
    "intend": lambda client: client.intend(KEY, "i1", ttl_s=5),
    "attend": lambda client: client.attend(KEY, SEED),
    "healthz": lambda client: client.healthz(),
    "snapshot": lambda client: client.snapshot(),
}


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("away", ["stands by", "is down"])
async def test_every_call_reaches_the_replica_that_leads_and_stays_with_it(call: str, away: str) -> None:
    standby, leader = Replica(503), Replica()
    async with replicas(standby, leader) as urls:
        down = f"http://127.0.0.1:{free_port()},{leader.url}"
        client = PlannerClient(urls if away == "stands by" else down)
        for _ in range(3):
            await CALLS[call](client)
    assert len(leader.seen) == 3
    assert len(standby.seen) == (1 if away == "stands by" else 0), "the one that worked last is tried first"


async def test_a_new_leader_is_found_by_the_call_that_finds_the_old_one_gone() -> None:
    first, second = Replica(), Replica(503)
    async with replicas(first, second) as urls:
        client = PlannerClient(urls)
        await client.announce(KEY, SEED)
        first.status, second.status = 503, 200
        assert await client.renew(LEASE) is Outcome.DONE
        assert [len(first.seen), len(second.seen)] == [2, 1]
        await client.renew(LEASE)
        assert [len(first.seen), len(second.seen)] == [2, 2]


@pytest.mark.parametrize(("status", "error"), [(404, NoSeedAvailable), (403, PlannerError), (500, PlannerError)])
async def test_an_answer_of_the_leader_is_final(status: int, error: type[Exception]) -> None:
    leader, other = Replica(status), Replica()
    async with replicas(leader, other) as urls:
        with pytest.raises(error):
            await PlannerClient(urls).acquire(KEY)
    assert other.seen == []


async def test_a_receiver_asks_again_while_no_replica_leads_yet() -> None:
    first, second = Replica(503), Replica(503, "3")
    paused_s: list[float] = []

    async def elected(pause_s: float) -> None:
        paused_s.append(pause_s)
        second.status = 200

    async with replicas(first, second) as urls:
        client = PlannerClient(urls, sleep=elected, jitter=lambda: 0.0)
        assert (await client.acquire(KEY)).seed == SEED
    assert paused_s == [1.0], "the shortest of the pauses that they ask for"


async def test_without_a_leader_a_call_that_cannot_wait_is_an_error_that_names_an_address() -> None:
    async with replicas(Replica(503), Replica(503)) as urls:
        with pytest.raises(PlannerError, match=r"planner http://127.*answered HTTP 503"):
            await PlannerClient(urls).announce(KEY, SEED)


async def test_an_error_of_all_addresses_names_each_and_no_password() -> None:
    ports = [free_port(), free_port()]
    urls = ",".join(f"http://user:s3cret@127.0.0.1:{port}" for port in ports)
    with pytest.raises(PlannerError) as caught:
        await PlannerClient(urls).announce(KEY, SEED)
    assert all(str(port) in str(caught.value) for port in ports)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("call", ["ask", "renew", "announce", "withdraw", "healthz"])
async def test_a_replica_that_hangs_costs_its_share_of_the_bound(call: str) -> None:
    """As one that is stopped: the kernel still accepts its connections."""
    leader = Replica()
    async with raw_server(b"", then="hang") as hung, replicas(leader):
        client = PlannerClient(f"{hung},{leader.url}", request_timeout_s=2.0)
        started_at = time.monotonic()
        await CALLS[call](client)
        first_s = time.monotonic() - started_at
        assert 0.9 <= first_s < 2.0
        await CALLS[call](client)
        assert time.monotonic() - started_at < first_s + 0.9, "it is not asked first again"


@pytest.mark.long  # it waits for 31 s
async def test_a_replica_that_hangs_at_the_first_question_does_not_cost_the_wait() -> None:
    """The planner answers the first question of a ticket at once, however long the receiver would wait."""
    leader = Replica()
    async with raw_server(b"", then="hang") as hung, replicas(leader):
        client = PlannerClient(f"{hung},{leader.url}", request_timeout_s=2.0)
        started_at = time.monotonic()
        assert isinstance(await client.ask(KEY, "t1", wait_s=60.0), Lease)
    assert 0.9 <= time.monotonic() - started_at < 32


@pytest.mark.parametrize("count", [1, 3, 8])
async def test_hung_replicas_together_cost_no_more_than_one(count: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(raw_server(b"", then="hang")) for _ in range(count)]
        client = PlannerClient(",".join(urls), request_timeout_s=1.0)
        for call in ("announce", "acquire"):
            started_at = time.monotonic()
            with pytest.raises(PlannerError):
                await CALLS[call](client)
            assert time.monotonic() - started_at < 1.5


async def test_a_question_without_a_ticket_that_may_have_arrived_goes_to_nobody_else() -> None:
    """It may have taken a lease; with a ticket the second question is given the same one."""
    other = Replica()
    async with raw_server(b"") as breaks, replicas(other):
        client = PlannerClient(f"{breaks},{other.url}")
        with pytest.raises(PlannerError):
            await client.acquire(KEY)
        assert other.seen == []
        assert isinstance(await PlannerClient(f"{breaks},{other.url}").ask(KEY, "t1"), Lease)
        assert len(other.seen) == 1


async def test_a_replica_that_was_held_up_does_not_shorten_a_wait_at_the_leader() -> None:
    """The share of a replica never cuts the time for which the planner may hold the call."""

    async def handle(request: web.Request) -> web.Response:
        await asyncio.sleep(1.2)
        return web.Response(headers=GRANTED)

    app = web.Application()
    app.router.add_get("/get_seed", handle)
    async with serve(app) as url:
        client = PlannerClient(f"{url},http://127.0.0.1:{free_port()}", request_timeout_s=1.0)
        assert (await client.acquire(KEY, wait_s=1.5)).seed == SEED


@pytest.mark.parametrize("ends", ["the connection breaks", "a proxy answers"])
async def test_a_second_replica_learns_that_the_first_announcement_had_no_answer(ends: str) -> None:
    leader, proxy = Replica(), Replica(502)
    async with raw_server(b"") as breaks, replicas(leader, proxy):
        first = breaks if ends == "the connection breaks" else proxy.url
        await PlannerClient(f"{first},{leader.url}").announce(KEY, SEED)
        await PlannerClient(f"http://127.0.0.1:{free_port()},{leader.url}").announce(KEY, SEED)
    assert [request.headers.get("RFORK-STATE") for request in leader.seen] == ["unanswered", None]


@pytest.mark.parametrize("ends", ["the connection breaks", "a proxy answers"])
async def test_the_next_announcement_says_that_one_before_had_no_answer_but_a_standbys(ends: str) -> None:
    """The leader may have recorded the first one, granted the seed, and lost its state since."""
    standby, proxy = Replica(503), Replica(502)
    async with raw_server(b"") as breaks, replicas(standby, proxy):
        first = breaks if ends == "the connection breaks" else proxy.url
        client = PlannerClient(f"{first},{standby.url}")
        with pytest.raises(PlannerError):
            await client.announce(KEY, SEED)
        assert client.state_of(SEED) == "unanswered"
        standby.status = 200
        client = PlannerClient(f"http://127.0.0.1:{free_port()},{standby.url}")
        await client.announce(KEY, SEED)
        assert client.state_of(SEED) == "", "an attempt that reached nobody says nothing"


async def test_presence_moves_to_the_leader() -> None:
    standby, leader = Replica(503), Replica(409)
    async with replicas(standby, leader) as urls:
        assert (await PlannerClient(urls).attend(KEY, SEED)).answer is Attendance.NOT_KNOWN


async def test_each_address_keeps_the_spelling_of_headers_that_it_needs() -> None:
    class Underscores(Replica):
        async def handle(self, request: web.Request) -> web.Response:
            answer = await super().handle(request)
            return answer if "SEED_KEY" in request.headers else web.Response(status=400)

    class Hyphens(Replica):
        async def handle(self, request: web.Request) -> web.Response:
            answer = await super().handle(request)
            return answer if "SEED-KEY" in request.headers else web.Response(status=400)

    first, second = Underscores(), Hyphens()
    async with replicas(first, second) as urls:
        client = PlannerClient(urls)
        await client.announce(KEY, SEED)
        first.status = 503
        await client.announce(KEY, SEED)
        first.status, second.status = 200, 503
        await client.announce(KEY, SEED)
        second.status = 200
        await client.announce(KEY, SEED)
    assert len(first.seen) == 4
    assert [("SEED-KEY" in request.headers) for request in second.seen] == [False, True, True]
