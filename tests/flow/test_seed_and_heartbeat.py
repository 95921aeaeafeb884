"""A seed's whole life beside a real planner: announced, read, suspended, withdrawn, killed; without a model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from vllm_rfork.clients import Outcome, PlannerClient, SeedClient
from vllm_rfork.errors import NoSeedAvailable, SeedError
from vllm_rfork.messages import Lease, SeedAddress

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEY = "/models/q$prod$kv_both$0$0"
DRAFT_KEY = KEY + "$draft"
WITHIN_S = 60.0


async def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not await condition():
        assert time.monotonic() < deadline, f"it never came true: {what}"
        await asyncio.sleep(0.02)


class Planner:
    """``vllm-rfork planner`` in a process of its own, on one port throughout."""

    program = ("-m", "vllm_rfork.cli.main", "planner")

    def __init__(self, *options: str) -> None:
        # Held by a socket that never listens, so that nobody else gets the port while the planner is away.
        self.reserved = socket.socket()
        self.reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.reserved.bind(("127.0.0.1", 0))
        self.port = self.reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.options = options
        self.client = PlannerClient(self.url, request_timeout_s=10.0)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        command = [sys.executable, *self.program, "--port", str(self.port), *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        await until(self.healthy, "the planner is up")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    async def healthy(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with self.session() as session, session.get(self.url + "/healthz") as response:
                return response.status == 200
        return False

    async def seeds(self) -> dict[tuple[str, int, int], dict[str, Any]]:
        async with self.session() as session, session.get(self.url + "/debug/snapshot") as response:
            seeds = (await response.json())["seeds"]
        return {(seed["ip"], seed["port"], seed["rank"]): seed for seed in seeds}

    async def knows(self, *seeds: SeedAddress) -> bool:
        """Whether these, and no others, are seeds that it may grant."""
        known = {name for name, seed in (await self.seeds()).items() if not seed.get("absent")}
        return known == {(seed.host, seed.port, seed.rank) for seed in seeds}

    async def attended(self) -> bool:
        """Whether every seed that it may grant has its connection."""
        return all(seed["present"] for seed in (await self.seeds()).values() if not seed["absent"])

    async def lease(self, key: str = KEY) -> Lease:
        return await self.client.acquire(key, fingerprint="f1")


class MockPlanner(Planner):
    """The one of ``examples/``."""

    program: tuple[str, ...] = (str(ROOT / "examples" / "rfork_planner.py"),)


class OldMockPlanner(MockPlanner):
    """The same without presence, as planners of the installed base are."""

    program = (
        "-c",
        "import sys; sys.path.insert(0, 'examples'); import rfork_planner as mock\n"
        "post = mock.web.RouteTableDef.post\n"
        "def other(table, path, **more):\n"
        "    return (lambda call: call) if path == '/rfork_presence' else post(table, path, **more)\n"
        "mock.web.RouteTableDef.post = other; mock.main()",
    )


class Worker:
    """``seed_worker.py`` in a session of its own.

    Args:
        before: a command that runs it, such as ``unshare``.
        options: more of what ``seed_worker.py`` takes.
    """

    def __init__(
        self,
        planner: Planner,
        *keys: str,
        interval_s: float = 0.3,
        before: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        told = {"planner": planner.url, "keys": keys or [KEY], "interval_s": interval_s, **options}
        self.process = subprocess.Popen(
            [*before, sys.executable, str(HERE / "seed_worker.py"), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
        )
        state = self.obey("state")
        self.pid: int = state["pid"]
        self.seeds = [SeedAddress(*seed) for seed in state["seeds"]]

    def obey(self, order: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        state: dict[str, Any] = json.loads(self.process.stdout.readline())
        return state

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a child of a worker that was killed, too
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def planner() -> Iterator[Planner]:
    made = Planner()
    yield made
    made.kill()
    made.reserved.close()


@contextlib.contextmanager
def working(planner: Planner, *keys: str, **options: Any) -> Iterator[Worker]:
    worker = Worker(planner, *keys, **options)
    try:
        yield worker
    finally:
        worker.end()


async def test_a_seed_is_found_through_the_planner_and_its_manifest_is_the_one_it_offers(planner: Planner) -> None:
    await planner.start()
    with working(planner) as worker:
        await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
        lease = await planner.lease()
        assert lease.seed == worker.seeds[0]
        manifest = await SeedClient().manifest(lease.seed, KEY, "f1")
        assert (manifest.epoch, manifest.seed_key) == ("epoch-1", KEY)
        await SeedClient().confirm_epoch(lease.seed, KEY, manifest.epoch)
        assert await planner.client.release(lease) is Outcome.DONE
        assert worker.obey("state")["heavy"] == []


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
async def test_a_killed_worker_is_no_seed_any_more_in_any_of_its_roles(planner: Planner, death: signal.Signals) -> None:
    await planner.start()
    with working(planner, KEY, DRAFT_KEY, interval_s=30.0) as worker:
        await until(lambda: planner.knows(*worker.seeds), "both seeds are announced")
        await until(planner.attended, "both seeds have their connections")
        os.killpg(worker.process.pid, death)
        await until(planner.knows, "both seeds are absent")
        for key in (KEY, DRAFT_KEY):
            with pytest.raises(NoSeedAvailable):
                await planner.lease(key)


async def test_a_worker_killed_while_it_is_read_gets_no_further_receiver(planner: Planner) -> None:
    await planner.start()
    with working(planner) as worker:
        await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
        await until(planner.attended, "the seed has its connection")
        lease = await planner.lease()
        worker.process.kill()
        await until(planner.knows, "the seed is absent")
        with pytest.raises(SeedError):
            await SeedClient().confirm_epoch(lease.seed, KEY, "epoch-1")
        assert await planner.client.release(lease) is Outcome.DONE
        with pytest.raises(NoSeedAvailable):
            await planner.lease()


async def test_a_planner_that_lost_everything_hears_of_the_seed_again(planner: Planner) -> None:
    await planner.start()
    # Long before the next heartbeat: the connection breaks, and the new planner says that it does not know the seed.
    with working(planner, interval_s=300.0) as worker:
        await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
        await until(planner.attended, "the seed has its connection")
        planner.kill()
        await planner.start()
        await until(lambda: planner.knows(*worker.seeds), "the seed is announced again")
        await until(planner.attended, "the seed has a connection again")
        worker.process.kill()
        await until(planner.knows, "the seed is absent")


async def test_a_worker_that_started_without_a_planner_is_announced_once_there_is_one(planner: Planner) -> None:
    with working(planner) as worker:
        assert await SeedClient().healthy(worker.seeds[0], KEY)
        await planner.start()
        await until(lambda: planner.knows(*worker.seeds), "the seed is announced")


async def test_a_planner_that_is_away_when_the_worker_dies_is_told_when_it_is_back(planner: Planner) -> None:
    await planner.start()
    with working(planner, interval_s=30.0) as worker:
        await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
        await until(planner.attended, "the seed has its connection")
        assert planner.process is not None
        os.kill(planner.process.pid, signal.SIGSTOP)  # away, and with its memory of the seed
        worker.process.kill()
        worker.process.wait()
        os.kill(planner.process.pid, signal.SIGCONT)
        await until(planner.knows, "the seed is absent")


async def test_a_seed_whose_weights_change_is_gone_first_and_comes_back_under_a_new_epoch(planner: Planner) -> None:
    await planner.start()
    with working(planner) as worker:
        await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
        lease = await planner.lease()
        old = await SeedClient().manifest(lease.seed, KEY, "f1")
        worker.obey("suspend")
        with pytest.raises(SeedError, match="about to change"):
            await SeedClient().confirm_epoch(lease.seed, KEY, old.epoch)
        with pytest.raises(SeedError, match="about to change"):
            await SeedClient().manifest(lease.seed, KEY, "f1")
        with pytest.raises(NoSeedAvailable):
            await planner.lease()
        await planner.client.release(lease)

        worker.obey("resume epoch-2")
        await until(lambda: planner.knows(*worker.seeds), "the seed is announced again")
        lease = await planner.lease()
        assert (await SeedClient().manifest(lease.seed, KEY, "f1")).epoch == "epoch-2"
        with pytest.raises(SeedError, match="epoch"):
            await SeedClient().confirm_epoch(lease.seed, KEY, old.epoch)
        await planner.client.release(lease)
        await until(planner.attended, "the new epoch has its connection")
        worker.process.kill()
        await until(planner.knows, "the new epoch is absent as well")


async def test_an_orderly_end_leaves_neither_seed_nor_service(planner: Planner) -> None:
    await planner.start()
    with working(planner, KEY, DRAFT_KEY) as worker:
        await until(lambda: planner.knows(*worker.seeds), "both seeds are announced")
        worker.obey("withdraw")
        assert await planner.seeds() == {}, "withdrawn, and not merely absent"
        for seed in worker.seeds:
            with pytest.raises(SeedError):
                await SeedClient(request_timeout_s=5.0).healthy(seed, KEY)
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        assert worker.process.wait(WITHIN_S) == 0


async def test_with_a_planner_that_has_no_presence_a_killed_seed_is_stale_in_the_end() -> None:
    planner = OldMockPlanner("--stale-after-sec", "8", "--sweep-every-sec", "0.1")
    await planner.start()
    try:
        with working(planner) as worker:
            await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
            await planner.client.release(await planner.lease())
            worker.process.kill()
            await until(planner.knows, "the seed is stale")
        with working(planner) as worker:
            await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
            worker.obey("withdraw")
            assert await planner.knows(), "withdrawn as ever"
    finally:
        planner.kill()
        planner.reserved.close()


async def test_the_mock_planner_sees_the_end_of_a_process_as_well() -> None:
    planner = MockPlanner()
    await planner.start()
    try:
        with working(planner, interval_s=30.0) as worker:
            await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
            await planner.client.release(await planner.lease())
            await until(planner.attended, "the seed has its connection")
            worker.process.kill()
            await until(planner.knows, "the seed is absent")
            with pytest.raises(NoSeedAvailable):
                await planner.lease()
    finally:
        planner.kill()
        planner.reserved.close()


async def test_a_stopped_worker_is_a_seed_error_within_the_timeout_and_stale_in_the_end() -> None:
    planner = Planner("--stale-after-sec", "3", "--sweep-every-sec", "0.1")
    await planner.start()
    try:
        with working(planner) as worker:
            await until(lambda: planner.knows(*worker.seeds), "the seed is announced")
            os.kill(worker.process.pid, signal.SIGSTOP)
            with pytest.raises(SeedError, match="no answer within"):
                await SeedClient(request_timeout_s=0.5).manifest(worker.seeds[0], KEY, "f1")
            await until(planner.knows, "the seed is stale")
            os.kill(worker.process.pid, signal.SIGCONT)
            await until(lambda: planner.knows(*worker.seeds), "the seed is announced again")
    finally:
        planner.kill()
        planner.reserved.close()
