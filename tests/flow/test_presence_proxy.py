"""Presence through a proxy that closes idle connections, and connections that break while the seed lives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.authority import Authority
from tests.flow.test_presence_processes import TlsPlanner, present
from tests.flow.test_seed_and_heartbeat import HERE, Planner, until, working
from vllm_rfork.clients import PlannerClient

#: Longest silence of the planner, and the silence after which the proxy closes a connection, in seconds: 20 and, for
#: nginx and most NATs, 60 in the field.
SILENT_S, IDLE_S = 0.5, 1.5
TOKEN = "a-token-of-this-fleet"


class Proxy:
    """Passes bytes on in both directions, and closes a connection on which neither side sends for ``idle_s``."""

    def __init__(self, port: int, idle_s: float) -> None:
        self._to = port
        self._idle_s = idle_s
        self._server: asyncio.Server | None = None
        #: open connections, and when each began and had its last byte
        self.open: dict[asyncio.Task[Any], list[float]] = {}
        self.closed_idle = 0

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def longest_s(self) -> float:
        """The age of the oldest open connection."""
        return max((time.monotonic() - times[0] for times in self.open.values()), default=0.0)

    def break_all(self) -> None:
        for task in self.open:
            task.cancel()

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        self.break_all()
        while self.open:
            await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        times = self.open[task] = [time.monotonic(), time.monotonic()]
        writers = [writer]
        try:
            with contextlib.suppress(OSError, asyncio.CancelledError):
                their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self._to)
                writers.append(their_writer)
                pipes = {
                    asyncio.create_task(_pipe(reader, their_writer, times)),
                    asyncio.create_task(_pipe(their_reader, writer, times)),
                }
                try:
                    while time.monotonic() - times[1] < self._idle_s:
                        done, _ = await asyncio.wait(pipes, timeout=0.05, return_when=asyncio.FIRST_COMPLETED)
                        if done:
                            return
                    self.closed_idle += 1
                finally:
                    for pipe in pipes:
                        pipe.cancel()
        finally:
            for each in writers:
                each.transport.abort()
            del self.open[task]


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, times: list[float]) -> None:
    with contextlib.suppress(OSError):
        while received := await reader.read(65536):
            times[1] = time.monotonic()
            writer.write(received)
            await writer.drain()


class Behind(Planner):
    """A planner with shorter silences that workers reach through a proxy."""

    def __init__(self, silent_s: float, *options: str) -> None:
        super().__init__(*options)
        self.program = (str(HERE / "quick_planner.py"), str(silent_s))


@contextlib.asynccontextmanager
async def behind(planner: Planner, idle_s: float) -> AsyncIterator[Proxy]:
    """Start ``planner`` and let its address, for workers, be the proxy's."""
    await planner.start()
    proxy = Proxy(planner.port, idle_s)
    own_url, port = planner.url, await proxy.start()
    planner.url = own_url.replace(str(planner.port), str(port))
    try:
        yield proxy
    finally:
        planner.url = own_url
        await proxy.stop()
        planner.kill()
        planner.reserved.close()


async def events(planner: Planner, kind: str) -> float:
    async with planner.session() as session, session.get(planner.url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    name = f'rfork_planner_events_total{{kind="{kind}"}} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.mark.parametrize("security", ["none", "TLS and a token"])
async def test_a_proxy_that_closes_idle_connections_does_not_cost_a_seed_its_presence(
    security: str, tmp_path: Path
) -> None:
    planner: Planner
    options: dict[str, Any] = {}
    if security == "none":
        planner = Behind(SILENT_S)
    else:
        authority, token_file = Authority(tmp_path), tmp_path / "token"
        token_file.write_text(TOKEN)
        cert, key = authority.issue("planner", names=("127.0.0.1",))
        files = ("--tls-cert", str(cert), "--tls-key", str(key), "--token-file", str(token_file))
        planner = SecurePlanner(authority.file, *files)
        options = {"ca_file": str(authority.file), "token": TOKEN}
    async with behind(planner, IDLE_S) as proxy:
        with working(planner, interval_s=30.0, **options) as worker:
            await present(planner, worker)
            await until(lambda: _true(proxy.longest_s() > 3 * IDLE_S), "a connection outlives the proxy's bound")
            assert proxy.closed_idle == 0
            assert await events(planner, "seed_absent") == 0
            await present(planner, worker)
            worker.process.kill()
            await until(planner.knows, "the planner sees the end through the proxy")


class SecurePlanner(TlsPlanner):
    """https, and a token on every call."""

    def __init__(self, ca_file: Path, *options: str) -> None:
        super().__init__(ca_file, *options)
        self.program = (str(HERE / "quick_planner.py"), str(SILENT_S))

    def session(self) -> Any:
        session = super().session()
        session.headers["Authorization"] = f"Bearer {TOKEN}"
        return session


async def _true(value: bool) -> bool:
    return value


async def test_a_connection_that_breaks_costs_one_reconnect_and_no_lease() -> None:
    planner = Behind(SILENT_S)
    async with behind(planner, 600.0) as proxy:
        with working(planner, interval_s=30.0) as worker:
            await present(planner, worker)
            lease = await PlannerClient(planner.url, request_timeout_s=10.0).acquire(
                "/models/q$prod$kv_both$0$0", fingerprint="f1"
            )
            proxy.break_all()
            await until(lambda: _events_are(planner, "seed_returned", 1), "the seed has made its connection again")
            await present(planner, worker)
            await PlannerClient(planner.url, request_timeout_s=10.0).renew(lease)
            assert await events(planner, "seed_absent") == 1
            await asyncio.sleep(2 * SILENT_S)
            assert await events(planner, "seed_absent") == 1, "one reconnect was enough"


async def _events_are(planner: Planner, kind: str, number: int) -> bool:
    return await events(planner, kind) == number


async def test_a_proxy_that_closes_sooner_than_the_planner_sends_is_outlived_by_reconnecting() -> None:
    """The control of the first test: without bytes in time the proxy does close, and the seed comes back each time."""
    planner = Behind(60.0)
    async with behind(planner, 0.5) as proxy:
        with working(planner, interval_s=30.0) as worker:
            await present(planner, worker)
            await until(lambda: _true(proxy.closed_idle >= 2), "the proxy closes idle connections")
            assert await events(planner, "seed_absent") >= 1
            await present(planner, worker)
