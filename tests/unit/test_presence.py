"""A presence request is open whenever the planner takes one, and no planner is pestered for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web

from tests.sockets import deaf
from tests.unit.interop_planners import serve
from tests.unit.virtual_time import VirtualTime, until
from vllm_rfork import messages
from vllm_rfork.clients import Attendance, Attended, PlannerClient
from vllm_rfork.clients.presence import FIRST_PAUSE_S, LONGEST_PAUSE_S, Presence
from vllm_rfork.errors import PlannerError
from vllm_rfork.messages import SeedAddress

FULL_PAUSE_S = 30.0
SEED = SeedAddress("127.0.0.1", 5000, 0)
AGAIN, NOT_KNOWN = Attended(Attendance.AGAIN), Attended(Attendance.NOT_KNOWN)
NO_SUCH_CALL, FULL = Attended(Attendance.NO_SUCH_CALL), Attended(Attendance.FULL)


class Planner:
    """Answers each request after ``held_s`` with what ``answer`` says."""

    def __init__(self, virtual: VirtualTime) -> None:
        self.virtual = virtual
        self.held_s = 50.0
        self.answer: Attended | PlannerError = AGAIN
        self.open = 0
        self.asked_at: list[float] = []

    async def attend(self) -> Attended:
        self.asked_at.append(self.virtual.clock())
        self.open += 1
        try:
            if self.held_s:
                await self.virtual.sleep(self.held_s)
            if isinstance(self.answer, PlannerError):
                raise self.answer
            return self.answer
        finally:
            self.open -= 1


@contextlib.asynccontextmanager
async def present(jitter: float = 1.0) -> AsyncIterator[tuple[Planner, Presence, VirtualTime, list[float]]]:
    virtual = VirtualTime()
    planner = Planner(virtual)
    announced: list[float] = []
    presence = Presence(
        planner.attend,
        lambda: announced.append(virtual.clock()),
        full_pause_s=FULL_PAUSE_S,
        clock=virtual.clock,
        sleep=virtual.sleep,
        jitter=lambda: jitter,
    )
    task = asyncio.create_task(presence.run())
    try:
        yield planner, presence, virtual, announced
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_an_answer_is_followed_by_the_next_request_at_once() -> None:
    async with present() as (planner, presence, virtual, _):
        await virtual.settle()
        assert planner.open == 0, "not before the seed is announced"
        presence.announced(other_planner=True)
        await virtual.settle()
        await virtual.advance(500.0)
        assert planner.open == 1
        assert planner.asked_at == [50.0 * number for number in range(11)]


async def test_a_broken_connection_is_made_anew_with_pauses_that_grow_to_a_bound_and_begin_anew() -> None:
    async with present() as (planner, presence, virtual, _):
        presence.announced(other_planner=True)
        await virtual.settle()
        planner.answer = PlannerError("broken")
        await virtual.advance(50.0)
        planner.held_s = 0
        await virtual.advance(FIRST_PAUSE_S)
        assert planner.asked_at == [0.0, 50.0 + FIRST_PAUSE_S], "the first comes soon: the seed is absent meanwhile"
        await virtual.advance(200.0)
        pauses = [
            round(later - earlier, 6)
            for earlier, later in zip(planner.asked_at[1:], planner.asked_at[2:], strict=False)
        ]
        assert pauses == sorted(pauses)
        assert max(pauses) == pytest.approx(LONGEST_PAUSE_S)
        planner.answer, planner.held_s = AGAIN, 50.0
        await virtual.advance(LONGEST_PAUSE_S)
        assert planner.open == 1
        planner.answer = PlannerError("broken again")
        asked = len(planner.asked_at)
        await virtual.advance(50.0)
        await virtual.advance(FIRST_PAUSE_S)
        assert len(planner.asked_at) == asked + 1


@pytest.mark.parametrize("jitter", [0.0, 1.0])
async def test_pauses_are_spread_over_half_of_them(jitter: float) -> None:
    async with present(jitter) as (planner, presence, virtual, _):
        planner.answer, planner.held_s = PlannerError("broken"), 0
        presence.announced(other_planner=True)
        await virtual.settle()
        assert virtual.asked_s == [FIRST_PAUSE_S * (1 + jitter) / 2]


async def test_a_planner_without_the_call_is_left_alone_until_it_is_another(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with present() as (planner, presence, virtual, _):
        planner.answer, planner.held_s = NO_SUCH_CALL, 0
        presence.announced(other_planner=True)
        await virtual.settle()
        for _ in range(20):
            await virtual.advance(30.0)
            presence.announced(other_planner=False)
        assert planner.asked_at == [0.0]
        assert [each.levelname for each in caplog.records] == ["INFO"]
        planner.answer, planner.held_s = AGAIN, 50.0
        presence.announced(other_planner=True)
        await virtual.settle()
        assert (len(planner.asked_at), planner.open) == (2, 1)


async def test_a_planner_that_answers_yes_to_everything_is_one_without_the_call() -> None:
    async with present() as (planner, presence, virtual, _):
        planner.held_s = 0
        presence.announced(other_planner=True)
        await virtual.settle()
        await virtual.advance(600.0)
        assert len(planner.asked_at) == 3


async def test_a_planner_that_does_not_know_the_seed_is_asked_again_after_the_announcement() -> None:
    async with present() as (planner, presence, virtual, announced):
        planner.answer, planner.held_s = NOT_KNOWN, 0
        presence.announced(other_planner=True)
        await virtual.settle()
        assert announced == [0.0]
        await virtual.advance(100.0)
        assert planner.asked_at == [0.0], "it has not been announced yet"
        planner.answer, planner.held_s = AGAIN, 50.0
        presence.announced(other_planner=False)
        await virtual.settle()
        assert planner.open == 1


async def test_a_planner_that_holds_enough_is_asked_about_once_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with present(0.0) as (planner, presence, virtual, _):
        planner.answer, planner.held_s = FULL, 0
        presence.announced(other_planner=True)
        await virtual.settle()
        await virtual.advance(10 * FULL_PAUSE_S)
        assert len(planner.asked_at) == 11
        assert len(caplog.records) == 1
        planner.answer = Attended(Attendance.FULL, 100.0)
        await virtual.advance(FULL_PAUSE_S)
        asked = len(planner.asked_at)
        await virtual.advance(99.0)
        assert len(planner.asked_at) == asked, "it said when to come back"


async def test_what_lasts_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with present() as (planner, presence, virtual, _):
        planner.answer, planner.held_s = PlannerError("the reason"), 0
        presence.announced(other_planner=True)
        await virtual.settle()
        await virtual.advance(300.0)
        planner.answer, planner.held_s = AGAIN, 50.0
        await virtual.advance(100.0)
    told = [(each.levelname, each.getMessage()) for each in caplog.records]
    assert [level for level, _ in told] == ["WARNING", "INFO"]
    assert "the reason" in told[0][1]


# --- the call itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "attended"),
    [
        (200, {}, AGAIN),
        (404, {}, NO_SUCH_CALL),
        (405, {}, NO_SUCH_CALL),
        (400, {}, NO_SUCH_CALL),
        (501, {}, NO_SUCH_CALL),
        (409, {}, NOT_KNOWN),
        (429, {"Retry-After": "60"}, Attended(Attendance.FULL, 60.0)),
        (401, {}, None),
        (403, {}, None),
        (503, {"Retry-After": "1"}, None),
    ],
)
async def test_what_the_planner_answers(status: int, headers: dict[str, str], attended: Attended | None) -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.method == "POST"
        assert messages.seed_key(request.headers) == "k"
        assert messages.seed_address(request.headers) == SEED
        assert (request.headers["RFORK-EPOCH"], request.headers["RFORK-FINGERPRINT"]) == ("e1", "f")
        return web.Response(status=status, headers=headers)

    app = web.Application()
    app.router.add_route("*", "/rfork_presence", answer)
    async with serve(app) as url:
        calling = PlannerClient(url).attend("k", SEED, fingerprint="f", epoch="e1")
        if attended is None:
            with pytest.raises(PlannerError, match=str(status)):
                await calling
        else:
            assert await calling == attended


@pytest.mark.parametrize(
    ("pieces", "attended"),
    [
        ([b"\n", b"\n", b"again\n"], AGAIN),
        ([b"\n", b"unknown\n"], NOT_KNOWN),
        ([b"\n", b"later\n"], None),
        ([b"\n"], None),
        ([b"anything that other planners answer"], AGAIN),
    ],
)
async def test_an_answer_in_pieces_ends_with_a_word(pieces: list[bytes], attended: Attended | None) -> None:
    """Once the first piece has come, no status can say it. An answer without a word has broken off."""

    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.headers[messages.STREAM] == "1"
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    app = web.Application()
    app.router.add_post("/rfork_presence", answer)
    async with serve(app) as url:
        calling = PlannerClient(url).attend("k", SEED)
        if attended is None:
            with pytest.raises(PlannerError):
                await calling
        else:
            assert await calling == attended


async def test_a_connection_that_is_silent_for_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_rfork.net.client.MAX_SILENCE_S", 0.3)
    ended = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(3):  # longer than the bound in all
            await response.write(b"\n")
            await asyncio.sleep(0.2)
        await ended.wait()
        return response

    app = web.Application()
    app.router.add_post("/rfork_presence", answer)
    async with serve(app) as url:
        started_at = asyncio.get_running_loop().time()
        with pytest.raises(PlannerError, match=r"silent for 0\.3 s"):
            await PlannerClient(url).attend("k", SEED)
        assert asyncio.get_running_loop().time() - started_at > 0.6
        ended.set()


async def broken_by(end: Callable[[asyncio.StreamWriter], None]) -> None:
    """A planner that ends the connection by itself while it holds the request."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        end(writer)

    server = await asyncio.start_server(serve_one, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(PlannerError):
            await PlannerClient(f"http://127.0.0.1:{port}").attend("k", SEED)


async def test_a_connection_that_the_planner_ends_is_an_error() -> None:
    await broken_by(lambda writer: writer.close())
    await broken_by(lambda writer: writer.transport.abort())


async def test_a_planner_that_takes_no_connection_is_given_up_within_the_request_timeout() -> None:
    with deaf() as url, pytest.raises(PlannerError, match=r"could not connect within 0\.1 s"):
        await PlannerClient(url, request_timeout_s=0.1).attend("k", SEED)


async def test_a_process_without_descriptors_is_told_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object, **__: object) -> socket.socket:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("vllm_rfork.net.long_lived.socket.socket", none_left)
    with pytest.raises(PlannerError, match=r"RLIMIT_NOFILE, ulimit -n"):
        await PlannerClient("http://127.0.0.1:9").attend("k", SEED)


async def test_the_connection_ends_with_the_process_and_not_with_its_children() -> None:
    """A forked child that kept the connection would hide its parent's death from the planner."""
    gone = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        held.set()
        await reader.read()
        gone.set()
        writer.close()

    held = asyncio.Event()
    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        attending = asyncio.create_task(PlannerClient(f"http://127.0.0.1:{port}").attend("k", SEED))
        await held.wait()
        ready, said = os.pipe()
        child = os.fork()
        if child == 0:  # it lives on, as a child that vLLM forked would
            os.write(said, b"x")
            signal.pause()
            os._exit(0)
        try:
            os.read(ready, 1)
            assert not gone.is_set(), "the child's start does not end the parent's connection"
            attending.cancel()
            await until(gone.is_set, "the planner sees the end although the child lives")
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            for each in (ready, said):
                os.close(each)
