"""What strangers can take of a planner: connections, memory, descriptors, log lines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import replace

import aiohttp
import pytest

from tests.planner.processes import PlannerUnderTest
from tests.planner.test_api import planner
from vllm_rfork.net.connection import Phase
from vllm_rfork.planner import app
from vllm_rfork.planner.app import PlannerProcess

PAGE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def until(condition: object, within_s: float = 20.0) -> None:
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():  # type: ignore[operator]
        assert asyncio.get_running_loop().time() < deadline, "the condition never came true"
        await asyncio.sleep(0.01)


async def connect(port: int, sent: bytes = b"") -> socket.socket:
    """A connection whose kernel takes next to nothing until it is read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    with contextlib.suppress(BlockingIOError, ConnectionError):
        sock.send(sent)
    return sock


def limited(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    whole = PlannerProcess._limits
    monkeypatch.setattr(PlannerProcess, "_limits", lambda self: replace(whole(self), **limits))


async def test_unread_answers_lock_nobody_out() -> None:
    """As many callers as there may be pipeline requests that need no token, and read nothing."""
    async with planner({"RFORK_TOKEN": "s3cret"}, max_connections=20) as client:
        held = [await connect(client.planner.port, PAGE * 500) for _ in range(20)]
        connections = client.planner.connections
        assert connections is not None
        await until(lambda: connections.count(Phase.WRITE) == 20)
        assert await client.status("GET", "/readyz") == 200
        assert await client.add(Authorization="Bearer s3cret") == 200
        assert len(connections) <= 20
        for each in held:
            each.close()


async def test_unread_answers_end_at_their_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, write_s=0.5)
    async with planner() as client:
        held = [await connect(client.planner.port, PAGE * 500) for _ in range(5)]
        connections = client.planner.connections
        assert connections is not None
        await until(lambda: connections.count(Phase.WRITE) == 5)
        await until(lambda: len(connections) == 0)
        for each in held:
            each.close()


async def test_connections_that_never_ask_end_and_one_that_asked_may_ask_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limited(monkeypatch, head_s=0.5)
    async with planner() as client:
        port = client.planner.port
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        silent[1][1].write(b"GET /healthz HTT")
        asker, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(asker.readuntil(b"}"), 30)
        for reader, _ in silent:
            assert await asyncio.wait_for(reader.read(), 30) == b""
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(asker.readuntil(b"}"), 30)
        for _, each in (*silent, (asker, writer)):
            each.close()


async def test_a_waiting_receiver_is_held_longer_than_other_calls() -> None:
    async with planner(max_wait_sec=3600) as client:
        waiting = asyncio.create_task(client.lease(**{"RFORK-WAIT-SEC": "3600"}))
        await client.waiting(1)
        connections = client.planner.connections
        assert connections is not None
        assert connections.count(Phase.HELD) == 1
        assert connections.limits.of(Phase.HELD) > 3600 > connections.limits.of(Phase.ANSWER)
        await client.add()
        assert (await asyncio.wait_for(waiting, 30))["SEED_PORT"] == "5000"


async def test_large_answers_that_nobody_reads_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are written as they are made; this bounds what is made as a whole."""
    monkeypatch.setattr(app, "_MAX_UNSENT_NBYTES", 1_000_000)
    async with planner(trust_announced_address=True, max_metric_keys=10_000) as client:
        for number in range(400):
            await client.add(5000, SEED_IP=f"10.0.{number // 250}.{number % 250}", SEED_KEY=f"{number}" + "k" * 500)
        connections = client.planner.connections
        assert connections is not None
        sock = await connect(client.planner.port, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: connections.unsent_nbytes > 1_000_000)
        for _ in range(3):
            status, headers, _ = await client.call("GET", "/metrics")
            assert (status, headers["Retry-After"]) == (503, "5")
        assert await client.status("GET", "/readyz") == 200
        sock.close()
        await until(lambda: connections.unsent_nbytes == 0)
        assert await client.status("GET", "/metrics") == 200


async def test_endless_headers_cost_next_to_nothing() -> None:
    """aiohttp before 3.14.2 kept them all: gigabytes."""
    async with planner() as client:
        for line in (b"X: y\r\n", b"X-%d: " % 7 + b"y" * 4000 + b"\r\n"):
            sock = await connect(client.planner.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            endless = line * (16_000_000 // len(line))  # more than the kernel's buffers
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(sock, endless), 30)
            sock.close()
        assert await client.status("GET", "/healthz") == 200


# --- descriptors ------------------------------------------------------------------------------------------------------


@pytest.fixture
def started() -> Iterator[list[PlannerUnderTest]]:
    processes: list[PlannerUnderTest] = []
    yield processes
    for each in processes:
        each.kill()


async def healthy(port: int) -> bool:
    with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
            session.get(f"http://127.0.0.1:{port}/healthz", headers={"Connection": "close"}) as answer,
        ):
            return answer.status == 200
    return False


async def test_fewer_descriptors_than_connections_are_said_and_lock_nobody_out(
    started: list[PlannerUnderTest],
) -> None:
    process = PlannerUnderTest(open_files=200)
    started.append(process)
    process.until_ready()
    held = [await connect(process.port) for _ in range(300)]
    for _ in range(3):
        assert await healthy(process.port)
    for each in held:
        each.close()
    assert process.stop() == 0
    assert any("200 open files" in line and "--max-connections" in line for line in process.log)
    assert len(process.log) < 15, process.log


async def test_descriptors_that_run_out_later_cost_a_line_a_minute(started: list[PlannerUnderTest]) -> None:
    process = PlannerUnderTest()
    started.append(process)
    process.until_ready()
    pid = process.process.pid
    assert await healthy(process.port)
    hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), hard))
    held = [await connect(process.port) for _ in range(50)]
    assert not await healthy(process.port)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (1000, hard))
    for each in held:
        each.close()
    deadline = asyncio.get_running_loop().time() + 20
    while not await healthy(process.port):
        assert asyncio.get_running_loop().time() < deadline
    assert process.stop() == 0
    assert len([line for line in process.log if "open files" in line or "Too many" in line]) <= 3
    assert len(process.log) < 15, process.log
