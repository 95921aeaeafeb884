"""The shared limits of connections, on either event loop: deadlines of each phase, room for newcomers, logs."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from aiohttp import web

from tests.authority import Authority
from tests.sockets import read_all
from vllm_rfork.net import descriptors, listener
from vllm_rfork.net.connection import Connection, Limits, Phase, Reply
from vllm_rfork.net.connections import ConnectionLimiter, Tls
from vllm_rfork.net.listener import Listener, listen
from vllm_rfork.net.seldom import EVERY_S, Seldom, SeldomFilter

LOG = logging.getLogger("tests.connections")
PATIENT = Limits(connections=50, opening_s=3600, head_s=3600, answer_s=3600, held_s=3600, write_s=3600, idle_s=3600)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"

Scenario = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    def run_(scenario: Coroutine[Any, Any, None]) -> None:
        loop = asyncio.new_event_loop() if request.param == "asyncio" else uvloop.new_event_loop()
        try:
            loop.run_until_complete(asyncio.wait_for(scenario, 30))
        finally:
            loop.close()

    return run_


class Service:
    """A server under test: ``answer`` is its handler, ``asked`` how often it was called."""

    def __init__(self, connections: ConnectionLimiter, port: int) -> None:
        self.connections = connections
        self.port = port
        self.asked = 0
        self.body = b"hello"
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse | Reply:
        self.asked += 1
        await self.may_answer.wait()
        return web.Response(body=self.body)


@contextlib.asynccontextmanager
async def serving(limits: Limits, tls: Tls | None = None, sent_nbytes: int = 8192) -> AsyncIterator[Service]:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        phase = Phase.HELD if request.path == "/held" else Phase.ANSWER
        return await service.connections.answer(request, service.answer, phase)

    http = web.Server(handle, access_log=None, lingering_time=0.2, handler_cancellation=True)
    seldom = Seldom(LOG)
    connections = ConnectionLimiter(http, limits, seldom, tls)
    listening = Listener(
        await listen("127.0.0.1", 0, backlog=128, sent_nbytes=sent_nbytes), connections.accepted, seldom
    )
    service = Service(connections, listening.port)
    try:
        yield service
    finally:
        listening.close()
        await connections.close()
        await http.shutdown(1.0)
        assert len(connections) == 0


async def connect(service: Service, sent: bytes = b"") -> socket.socket:
    """A connection whose kernel takes next to nothing until it is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", service.port))
    await loop.sock_sendall(sock, sent)
    return sock


async def read_until(sock: socket.socket, end: bytes) -> bytes:
    received = b""
    while not received.endswith(end):
        received += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1), 30)
    return received


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition never came true"
        await asyncio.sleep(0.01)


Run = Callable[[Coroutine[Any, Any, None]], None]

# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: "])
def test_a_request_that_does_not_come_ends_the_connection(run: Run, sent: bytes) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, head_s=0.2)) as service:
            with await connect(service, sent) as sock:
                assert await read_all(sock) == b""
            assert service.asked == 0

    run(scenario())


def test_a_head_that_trickles_in_ends_the_connection(run: Run) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, head_s=0.4)) as service:
            with await connect(service, b"GET / HTTP/1.1\r\n") as sock:

                async def trickle() -> None:
                    while True:
                        await asyncio.get_running_loop().sock_sendall(sock, b"X: y\r\n")
                        await asyncio.sleep(0.05)

                with pytest.raises(ConnectionError):
                    await asyncio.wait_for(trickle(), 30)
            assert service.asked == 0

    run(scenario())


def test_a_handshake_that_does_not_come_ends_the_connection(run: Run, tmp_path: Path) -> None:
    context = server_context(tmp_path)

    async def scenario() -> None:
        for told_apart in (False, True):
            for sent in (b"", b"\x16\x03\x01\x02\x00\x01"):
                async with serving(replace(PATIENT, opening_s=0.3), Tls(lambda: context, told_apart)) as service:
                    with await connect(service, sent) as sock:
                        assert len(await read_all(sock)) < 64  # nothing, or an alert
                    await until(lambda: len(service.connections) == 0)

    run(scenario())


@pytest.mark.parametrize(("path", "short"), [(b"/", "answer_s"), (b"/held", "held_s")])
def test_a_handler_that_does_not_end_is_ended_with_one_line(
    run: Run, path: bytes, short: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, **{short: 0.2})) as service:
            service.may_answer.clear()
            for _ in range(3):
                with await connect(service, GET.replace(b"/", path, 1)) as sock:
                    assert await read_all(sock) == b""
            assert service.asked == 3

    run(scenario())
    assert [each.levelname for each in caplog.records if "took longer than 0.2 s" in each.message] == ["WARNING"]


@pytest.mark.parametrize("nbytes", [200_000, 8_000_000])
def test_an_answer_that_is_not_taken_ends_the_connection(run: Run, nbytes: int) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, write_s=0.5)) as service:
            service.body = b"x" * nbytes
            with await connect(service, GET) as sock:
                await until(lambda: service.asked == 1)
                await until(lambda: len(service.connections) == 0)
                assert len(await read_all(sock)) < nbytes
            assert service.connections.unsent_nbytes == 0

    run(scenario())


def test_an_answer_that_is_taken_slowly_arrives_whole(run: Run) -> None:
    async def scenario() -> None:
        async with serving(PATIENT) as service:
            service.body = bytes(range(256)) * 20_000
            with await connect(service, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) as sock:
                assert (await read_all(sock)).endswith(b"\r\n\r\n" + service.body)

    run(scenario())


def test_idle_connections_end_and_others_may_ask_again(run: Run) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, idle_s=0.5)) as service:
            with await connect(service) as sock:
                for _ in range(3):
                    await asyncio.get_running_loop().sock_sendall(sock, GET)
                    await read_until(sock, b"hello")
                assert await read_all(sock) == b""
            assert service.asked == 3

    run(scenario())


def test_a_body_that_does_not_come_ends_the_connection(run: Run) -> None:
    async def scenario() -> None:
        async with serving(PATIENT) as service:
            with await connect(service, GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 9999\r\n\r\n")) as sock:
                assert (await read_all(sock)).endswith(b"hello")

    run(scenario())


@pytest.mark.parametrize("told_apart", [False, True])
def test_nothing_that_is_not_tls_reaches_the_log(
    run: Run, told_apart: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = server_context(tmp_path)
    trusting_nobody = ssl.create_default_context()

    async def scenario() -> None:
        async with serving(PATIENT, Tls(lambda: context, told_apart)) as service:
            for sent in (b"\x16\x03\x01\x00\x02\x01\x00", b"\x16" * 600, b"\x00" * 100, b"SSH-2.0-x\r\n"):
                with await connect(service, sent) as sock:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_WR)
                    await read_all(sock)
            with pytest.raises(ssl.SSLError):  # the client rejects the certificate
                await asyncio.open_connection("127.0.0.1", service.port, ssl=trusting_nobody, server_hostname="x")
            await until(lambda: len(service.connections) == 0)

    run(scenario())
    gc.collect()  # an exception that nobody retrieved is logged when its task is collected
    found = [each for each in caplog.records if each.levelno >= logging.WARNING and each.name != "aiohttp.server"]
    assert [each.getMessage() for each in found] == []


# --- what one connection can cost ------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [10_000, 50_000])
def test_requests_are_not_decided_before_the_last_answer_has_left(run: Run, nbytes: int) -> None:
    """A caller that pipelines and never reads costs the kernel's buffers and one answer."""

    async def scenario() -> None:
        async with serving(replace(PATIENT, request_nbytes=1 << 20)) as service:
            service.body = b"x" * nbytes
            with await connect(service, GET * 1000) as sock:
                await until(lambda: service.connections.count(Phase.WRITE) == 1)
                asked = service.asked
                assert asked <= 30
                await read_until(sock, b"\r\n\r\n")
                with await connect(service, GET) as other:  # and nobody else waits for it
                    await read_until(other, b"\r\n\r\n")

    run(scenario())


@pytest.mark.parametrize("begun", [b"GET / HTTP/1.1\r\n", GET])
def test_a_caller_that_goes_on_sending_is_cut_off(run: Run, begun: bytes) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, request_nbytes=100_000)) as service:
            service.may_answer.clear()
            with await connect(service, begun) as sock, pytest.raises(ConnectionError):
                await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(sock, b"X: y\r\n" * 5_000_000), 30)
            await until(lambda: len(service.connections) == 0)

    run(scenario())


# --- how many ---------------------------------------------------------------------------------------------------------


def test_a_connection_that_leaves_its_server_counts_and_is_closed_by_its_new_owner(run: Run) -> None:
    """Its handler is cancelled, as if the peer had gone."""

    async def scenario() -> None:
        async with serving(PATIENT) as service:
            taken: list[Connection] = []
            events: list[str] = []

            async def detach(request: web.BaseRequest) -> web.StreamResponse:
                connection = Connection.of(request)
                assert connection is not None
                connection.detach(lambda: events.append("lost"))
                taken.append(connection)
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    events.append("cancelled")
                    raise
                return web.Response()

            service.answer = detach  # type: ignore[method-assign]
            with await connect(service, GET) as sock:
                await until(lambda: events == ["cancelled"])
                assert len(service.connections) == 1
                taken[0].write(b"some")
                assert await read_until(sock, b"some") == b"some"
                await asyncio.get_running_loop().sock_sendall(sock, GET)
                taken[0].write(b"last", last=True)
                assert (await read_all(sock)).endswith(b"last"), "what the peer sends is dropped"
                await until(lambda: events == ["cancelled", "lost"])
                assert len(service.connections) == 0
            with await connect(service, GET):
                await until(lambda: len(taken) == 2)
            await until(lambda: events[-1] == "lost" and len(events) == 4)

    run(scenario())


def test_the_connection_that_has_waited_longest_makes_room(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, connections=3)) as service:
            held = [await connect(service, sent) for sent in (b"", b"GET /", GET)]
            await read_until(held[2], b"hello")
            for number in range(2):
                newcomer = await connect(service, GET)
                await read_until(newcomer, b"hello")
                assert await read_all(held[number]) == b""
                held.append(newcomer)
            assert len(service.connections) == 3
            for each in held:
                each.close()

    run(scenario())
    assert len([each for each in caplog.records if "closed for a new one" in each.message]) == 1


def test_callers_that_do_not_read_make_room_too(run: Run) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, connections=3)) as service:
            service.body = b"x" * 1_000_000
            held = [await connect(service, GET) for _ in range(3)]
            await until(lambda: service.connections.count(Phase.WRITE) == 3)
            service.body = b"hello"
            with await connect(service, GET) as newcomer:
                await read_until(newcomer, b"hello")
            for each in held:
                each.close()

    run(scenario())


def test_a_call_that_is_decided_is_not_cut_off_for_another(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serving(replace(PATIENT, connections=2)) as service:
            service.may_answer.clear()
            held = [await connect(service, GET.replace(b"/", b"/held", 1)), await connect(service, GET)]
            await until(lambda: service.asked == 2)
            for _ in range(20):
                with await connect(service) as refused:
                    assert await read_all(refused) == b""
            service.may_answer.set()
            for each in held:
                await read_until(each, b"hello")
                each.close()

    run(scenario())
    assert len([each for each in caplog.records if "was refused" in each.message]) == 1


def server_context(folder: Path) -> ssl.SSLContext:
    cert, key = Authority(folder).issue("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


def test_handshakes_in_progress_count_and_lock_nobody_out(run: Run, tmp_path: Path) -> None:
    context = server_context(tmp_path)
    trusting = ssl.create_default_context()
    trusting.check_hostname = False
    trusting.verify_mode = ssl.CERT_NONE

    async def scenario() -> None:
        async with serving(replace(PATIENT, connections=4), Tls(lambda: context)) as service:
            held = [await connect(service, b"\x16\x03\x01" if n % 2 else b"") for n in range(12)]
            await until(lambda: service.connections.count(Phase.OPENING) == 4)
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port, ssl=trusting)
            writer.write(GET)
            assert (await asyncio.wait_for(reader.readuntil(b"hello"), 30)).startswith(b"HTTP/1.1 200")
            assert len(service.connections) <= 4
            writer.transport.abort()
            for each in held:
                each.close()

    run(scenario())


# --- descriptors and logs ---------------------------------------------------------------------------------------------


def test_accepting_rests_when_descriptors_have_run_out_and_goes_on(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "PAUSE_S", 0.05)

    class NoneLeft(socket.socket):
        fails = 20

        def accept(self) -> Any:
            if NoneLeft.fails:
                NoneLeft.fails -= 1
                raise OSError(24, "Too many open files")
            return super().accept()

    async def scenario() -> None:
        accepted: list[socket.socket] = []
        (real,) = await listen("127.0.0.1", 0, backlog=8)
        listening = Listener([NoneLeft(fileno=real.detach())], accepted.append, Seldom(LOG))
        with socket.create_connection(("127.0.0.1", listening.port)):
            await until(lambda: len(accepted) == 1)
        listening.close()
        accepted[0].close()

    run(scenario())
    lines = [each for each in caplog.records if "Too many open files" in each.message]
    assert len(lines) == 1
    assert "ulimit -n" in lines[0].message


def test_the_last_descriptors_of_a_process_are_not_for_strangers(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with serving(PATIENT) as service:
            with monkeypatch.context() as few:
                few.setattr(descriptors, "limit", lambda: 3 + listener.KEPT)
                for _ in range(5):
                    with await connect(service, GET) as sock:
                        assert await read_all(sock) == b""
            assert service.asked == 0
            with await connect(service, GET) as sock:
                await read_until(sock, b"hello")

    run(scenario())
    assert len([each for each in caplog.records if "ulimit -n" in each.message]) == 1


def test_limits_follow_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "spare", lambda: 1000)
    assert descriptors.connections(30_000, kept=64) == 936
    assert descriptors.connections(100, kept=64) == 100
    assert descriptors.connections(256, kept=32, share=0.25) == 242
    monkeypatch.setattr(descriptors, "spare", lambda: 10)
    assert descriptors.connections(30_000, kept=64) == 1


def test_a_line_that_strangers_cause_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    seldom = Seldom(LOG, lambda: now[0])
    for _ in range(1000):
        seldom.warning("kind", "refused %s", "a")
        seldom.warning("other", "refused %s", "b")
    now[0] += EVERY_S
    seldom.warning("kind", "refused %s", "c")
    assert [each.message for each in caplog.records] == [
        "refused a",
        "refused b",
        "refused c (999 more of these since the last line)",
    ]


def test_a_logger_of_others_is_quietened_by_its_kinds_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = logging.getLogger("tests.connections.others")
    log.addFilter(SeldomFilter(lambda: now[0]))
    for number in range(100):
        log.warning("from %d", number)
    now[0] += EVERY_S
    log.warning("from %d", 100)
    assert [each.message for each in caplog.records] == ["from 0", "from 100"]


def test_a_tls_connection_that_its_transport_has_forgotten_is_cut_off() -> None:
    """As in Python 3.11.2 after a second close."""

    class Forgetful(asyncio.Transport):
        def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
            pass

        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return ours

        def abort(self) -> None:
            raise AttributeError("'NoneType' object has no attribute '_abort'")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(5.0)
        owner: Any = SimpleNamespace(began=lambda *given: None)
        connection = Connection(owner, asyncio.Protocol())
        connection.connection_made(Forgetful())
        connection.abort()
        assert theirs.recv(1) == b""
