"""A receiver's question for a seed: its ticket, its wait, what it tells the log, and when it stops by itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from tests.unit.interop_planners import OldPlanner, ProductionPlanner, TtlWithoutRenewal, free_port, serve
from tests.unit.virtual_time import VirtualTime, until
from vllm_rfork.clients import LeaseKeeper, Outcome, PlannerClient
from vllm_rfork.config import parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.errors import NoSeedAvailable, PlannerError
from vllm_rfork.fork import seed_wait
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.seed_wait import LeaseRequest
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.messages import BadMessage, Lease, SeedAddress, Waiting, parse_waiting

KEY = "/models/q$prod$kv_both$0$0"
SEED = SeedAddress("10.0.0.1", 8080, 0)
GRANT = {"SEED_IP": "10.0.0.1", "SEED_PORT": "8080", "SEED_RANK": "0", "USER_ID": "u1", "LEASE_TTL_SEC": "60"}
WITHIN_S = 60.0


class Time:
    """Seconds that a planner lets pass with each answer; sleeping passes them as well."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Script:
    """A planner that answers ``get_seed`` from a list, the last answer for ever.

    An answer is a :class:`Waiting`, headers of a grant, a status, or None for a connection that breaks. ``takes_s``:
    what passes of ``time`` until an answer that is not the first to its ticket.
    """

    def __init__(self, *answers: Waiting | dict[str, str] | int | None, takes_s: float = 10.0) -> None:
        self.answers, self.takes_s, self.time = list(answers), takes_s, Time()
        self.seen: list[web.Request] = []
        self.others: list[tuple[str, str | None]] = []
        self.text = "every seed is in use"

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/get_seed", self.get_seed)
        app.router.add_post("/{any}", self.other)
        return app

    async def other(self, request: web.Request) -> web.Response:
        self.others.append((request.path, request.headers.get("RFORK-INTENT-TTL-SEC")))
        return web.Response()

    async def get_seed(self, request: web.Request) -> web.Response:
        self.seen.append(request)
        if len(self.seen) > 1:
            self.time.now += self.takes_s
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if isinstance(answer, Waiting):
            return web.Response(status=404, headers={"RFORK-WAITING": str(answer)}, text="wait")
        if isinstance(answer, int):
            return web.Response(status=answer, text=self.text)
        return web.Response(headers=answer)

    def sent(self, name: str) -> list[str | None]:
        return [request.headers.get(name) for request in self.seen]


def question(url: str, time: Time | None = None, **more: Any) -> LeaseRequest:
    clock: dict[str, Any] = {} if time is None else {"clock": time, "sleep": time.sleep}
    return LeaseRequest(PlannerClient(url, request_timeout_s=5.0), KEY, "f1", **clock, **more)


async def ask(script: Script, **more: Any) -> Lease:
    async with serve(script.app()) as url:
        return await asyncio.to_thread(question(url, script.time, **more).lease)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == seed_wait.__name__]


# --- the ticket ------------------------------------------------------------------------------------------------------


async def test_a_question_keeps_its_ticket_and_states_a_wait_only_where_one_is_set() -> None:
    script = Script(Waiting(2, 120.0, None, "loading"), Waiting(1, 120.0, 3.0, "busy"), {**GRANT, "RFORK-TICKET": "t"})
    lease = await ask(script)
    assert (lease.seed, lease.unconfirmed) == (SEED, True)
    (ticket,) = set(script.sent("RFORK-TICKET"))
    assert ticket is not None
    assert re.fullmatch("[0-9a-f]{32}", ticket)
    assert script.sent("RFORK-WAIT-SEC") == [None, None, None]
    other = Script(GRANT)
    assert (await ask(other)).unconfirmed is False, "an older planner knows no tickets"
    assert other.sent("RFORK-TICKET") != [ticket]


@pytest.mark.parametrize(
    ("wait_s", "sent"), [(0.0, ["0"]), (25.0, ["25", "25", "15", "5"]), (15.0, ["15", "15", "5", "0"])], ids=str
)
async def test_a_wait_that_is_set_is_stated_and_what_is_left_of_it_afterwards(wait_s: float, sent: list[str]) -> None:
    answers: list[Any] = [Waiting(1, wait_s, None, "busy")] * (len(sent) - 1) + [404]
    script = Script(*answers)  # the first answer comes at once, the others after ten seconds each
    with pytest.raises(NoSeedAvailable):
        await ask(script, wait_s=wait_s)
    assert script.sent("RFORK-WAIT-SEC") == sent


@pytest.mark.parametrize("make", [OldPlanner, ProductionPlanner, TtlWithoutRenewal], ids=lambda make: make.__name__)
async def test_older_planners_answer_immediately(make: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    planner = make()
    async with serve(planner.app()) as url:
        with pytest.raises(NoSeedAvailable) as told:
            await asyncio.to_thread(question(url).lease)
        client = PlannerClient(url)
        await client.announce(KEY, SEED)
        lease = await asyncio.to_thread(question(url).lease)
        assert (lease.seed.port, lease.unconfirmed) == (SEED.port, False)
    assert told.value.intent_granted is False
    assert lines(caplog) == []


async def test_a_question_whose_connection_breaks_is_repeated_once_and_with_the_same_ticket() -> None:
    script = Script(None, GRANT)
    await ask(script)
    assert len(script.seen) == 2
    assert len(set(script.sent("RFORK-TICKET"))) == 1
    broken = Script(None)
    with pytest.raises(PlannerError):
        await ask(broken)
    assert len(broken.seen) == 2


async def test_without_a_ticket_no_question_is_repeated_behind_the_callers_back() -> None:
    """aiohttp repeats a GET whose connection breaks: the planner would grant a second lease, which nobody releases."""
    script = Script(None, GRANT)
    async with serve(script.app()) as url:
        with pytest.raises(PlannerError):
            await PlannerClient(url).acquire(KEY)
    assert len(script.seen) == 1


async def test_a_planner_that_dies_under_a_waiting_receiver_is_asked_again_with_its_ticket() -> None:
    script = Script(Waiting(1, 120.0, None, "busy"), None, None, GRANT, takes_s=0.3)
    assert (await ask(script)).seed == SEED
    assert len(set(script.sent("RFORK-TICKET"))) == 1
    assert len(script.seen) == 4


async def test_a_planner_that_nobody_can_reach_costs_no_wait() -> None:
    with pytest.raises(PlannerError):
        await asyncio.wait_for(asyncio.to_thread(question(f"http://127.0.0.1:{free_port()}").lease), WITHIN_S)


# --- the wait --------------------------------------------------------------------------------------------------------


async def test_the_log_says_when_a_wait_begins_goes_on_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    script = Script(
        Waiting(3, 120.0, None, "loading"),
        Waiting(3, 120.0, None, "loading"),
        Waiting(2, 45.0, 12.4, "busy"),
        GRANT,
    )
    await ask(script)
    assert lines(caplog) == [
        "RFork: waiting for a seed: position 3 in the queue, at most 120 s, because another worker loads the weights "
        "from storage and will be a seed",
        "RFork: still waiting for a seed after 10 s: position 3 in the queue, at most 120 s, because another worker "
        "loads the weights from storage and will be a seed",
        "RFork: still waiting for a seed after 20 s: position 2 in the queue, at most 45 s, 12 s expected, because "
        "every seed of its key is in use",
        "RFork: seed 10.0.0.1:8080:0 is free, after a wait of 30.0 s",
    ]


async def test_the_log_says_why_a_wait_ends_without_a_seed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    script = Script(Waiting(1, 120.0, None, "loading"), 404)
    script.text = "it has waited 120 s, and the bound is 120 s"
    with pytest.raises(NoSeedAvailable):
        await ask(script)
    assert lines(caplog)[-1].startswith("RFork: stopped waiting for a seed after 10.0 s: the planner has no free seed")
    assert lines(caplog)[-1].endswith("it has waited 120 s, and the bound is 120 s")


async def test_short_slices_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    script = Script(*[Waiting(1, 120.0, None, "busy")] * 29, GRANT, takes_s=1.0)
    await ask(script)
    assert len(lines(caplog)) == 1 + 3 + 1


async def test_a_planner_that_keeps_a_receiver_beyond_its_own_bound_is_left() -> None:
    script = Script(Waiting(1, 25.0, None, "busy"))
    with pytest.raises(NoSeedAvailable, match="bound is 25 s"):
        await ask(script)
    assert len(script.seen) == 5, "the bound and a slice more, since the planner is the one to end it"


async def test_the_bound_is_of_all_waits_of_one_start() -> None:
    script = Script(Waiting(1, 25.0, None, "busy"))
    with pytest.raises(NoSeedAvailable, match="it has waited 30 s"):
        await ask(script, waited_before_s=20.0)
    assert len(script.seen) == 2


async def test_a_planner_that_answers_every_question_at_once_is_not_asked_without_a_pause() -> None:
    script = Script(Waiting(1, 5.0, None, "busy"), takes_s=0.0)
    with pytest.raises(NoSeedAvailable):
        await ask(script)
    assert len(script.seen) <= (5.0 + 10.0) / 0.2 + 2


async def test_no_wait_goes_on_beyond_the_bound_of_a_fork() -> None:
    script = Script(Waiting(1, 3600.0, None, "busy"))
    with pytest.raises(NoSeedAvailable, match="rfork_fork_timeout_sec"):
        await ask(script, until=1035.0)
    assert len(script.seen) == 5


async def test_a_rank_whose_instance_loads_leaves_the_queue_while_its_question_is_held() -> None:
    asked, held, hung_up = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def get_seed(request: web.Request) -> web.Response:
        if not asked.is_set():
            asked.set()
            return web.Response(status=404, headers={"RFORK-WAITING": str(Waiting(1, 120.0))})
        held.set()
        try:
            await asyncio.sleep(WITHIN_S)
        finally:
            hung_up.set()
        return web.Response(status=404)

    app = web.Application()
    app.router.add_get("/get_seed", get_seed)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        leaving = question(url, no_longer_needed=lambda: "rank 0: it loads" if held.is_set() else "")
        with pytest.raises(NoSeedAvailable, match="rank 0: it loads"):
            await asyncio.wait_for(asyncio.to_thread(leaving.lease), WITHIN_S)
        assert leaving.left
        await asyncio.wait_for(hung_up.wait(), WITHIN_S)
    finally:
        await runner.cleanup()


# --- what an session makes of it -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def session_at(script: Script, **options: Any) -> AsyncIterator[ForkSession]:
    async with serve(script.app()) as url:
        settings = parse_config({"rfork_scheduler_url": url, "rfork_request_timeout_sec": 5.0, **options}, {}).settings
        session = ForkSession(settings, KEY, EngineSet(["memory"], EngineConfig(device="cpu")))
        try:
            yield session
        finally:
            await asyncio.to_thread(session.close)


async def test_who_leaves_the_queue_by_itself_tells_the_planner_that_it_loads() -> None:
    script = Script(Waiting(1, 120.0, None, "loading"))
    async with session_at(script) as session:
        session.leases.no_longer_needed = lambda: "rank 1: it loads" if script.seen else ""
        with pytest.raises(NoSeedAvailable):
            await asyncio.to_thread(session.reserve, "f1")
        await until(lambda: script.others, "it states its intent")
        assert script.others[0] == ("/rfork_intent", "30")


@pytest.mark.parametrize(("given", "sent"), [({}, None), ({"rfork_seed_wait_sec": 0.0}, "0")], ids=["default", "0"])
async def test_the_option_decides_whether_a_wait_is_stated(given: dict[str, Any], sent: str | None) -> None:
    script = Script(404)
    async with session_at(script, **given) as session:
        with pytest.raises(NoSeedAvailable):
            await asyncio.to_thread(session.reserve, "f1")
    assert script.sent("RFORK-WAIT-SEC") == [sent]
    assert len(script.seen) == 1


# --- the confirmation ------------------------------------------------------------------------------------------------


class Renewals(PlannerClient):
    """Answers renewals with each outcome in turn, and the last for ever."""

    def __init__(self, *outcomes: Outcome | None) -> None:
        super().__init__("http://unused")
        self.outcomes, self.at_s = list(outcomes), list[float]()
        self.virtual = VirtualTime()

    async def renew(self, lease: Lease) -> Outcome:
        self.at_s.append(self.virtual.now_s)
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if outcome is None:
            raise PlannerError("away")
        return outcome


@pytest.mark.parametrize(
    ("unconfirmed", "outcomes", "at_s"),
    [
        (True, [Outcome.DONE], [0.0, 20.0, 40.0]),
        (True, [None, None, Outcome.DONE], [0.0, 1.0, 2.0, 22.0, 42.0]),
        (False, [Outcome.DONE], [20.0, 40.0]),
    ],
)
async def test_a_lease_by_ticket_is_confirmed_at_once(
    unconfirmed: bool, outcomes: list[Outcome | None], at_s: list[float]
) -> None:
    client = Renewals(*outcomes)
    lease = Lease(SEED, "u1", 60.0, unconfirmed)
    keeper = LeaseKeeper(client, lease, clock=client.virtual.clock, sleep=client.virtual.sleep)
    await keeper.start()
    await client.virtual.settle()
    await client.virtual.advance(45.0)
    assert client.at_s == at_s
    keeper.check()
    await keeper.stop()


# --- on the wire -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Waiting(3, 120.0), "position=3; bound=120; reason="),
        (Waiting(1, 90.5, 12.25, "busy"), "position=1; bound=90.5; expected=12.25; reason=busy"),
    ],
)
def test_a_place_in_the_queue_as_text(place: Waiting, text: str) -> None:
    assert str(place) == text
    assert parse_waiting(text) == place
    assert parse_waiting(text.replace(" ", "") + ";new=1") == place, "newer planners may say more"


@pytest.mark.parametrize(
    "text",
    ["", "position=0; bound=1", "position=1", "bound=1", "position=1; bound=1e3", "position=1; bound=1; expected=nan"],
)
def test_what_is_no_place_in_the_queue_is_refused(text: str) -> None:
    with pytest.raises(BadMessage):
        parse_waiting(text)


def test_an_unusable_reason_is_left_out() -> None:
    assert parse_waiting("position=1; bound=1; reason=x\x1b[31m").reason == ""
