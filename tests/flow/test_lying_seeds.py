"""Seeds whose endpoints or regions lie, before receivers with real engines: another lane or seed, and no harm.

An honest seed is a process with two engines. The liars publish its manifest, altered, on a service of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.flow.granting_planner import GrantingPlanner
from tests.flow.memory_seed import KEY, NBYTES, contents, manifest_of
from tests.flow.test_fork_reports import Taking
from tests.unit.interop_planners import serve
from vllm_rfork.clients import SeedClient
from vllm_rfork.config import parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.errors import ForkError
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.session import Destination, ForkSession
from vllm_rfork.manifest.schema import EngineEndpoint, Manifest, Region, Span
from vllm_rfork.messages import SeedAddress
from vllm_rfork.seed_service import SeedService
from vllm_rfork.selftest.buffers import Buffer

ROOT = Path(__file__).parents[2]
PAGE = 4096
WITHIN_S = 60.0
AROUND = b"\xa5" * PAGE
ORDERS = (["nixl", "memory"], ["memory", "nixl"])
Altered = Callable[[Manifest], Manifest]


class Fleet(GrantingPlanner):
    """An honest seed, and a planner."""

    def __init__(self, honest: SeedAddress, manifest: Manifest) -> None:
        super().__init__()
        self.honest, self.manifest = honest, manifest
        self.url = ""

    @contextlib.asynccontextmanager
    async def liar(self, altered: Altered) -> AsyncIterator[None]:
        """Grants a seed that publishes what ``altered`` makes of the honest manifest, and then the honest one."""
        service = SeedService(altered(self.manifest), bind_host="127.0.0.1")
        await service.start()
        async with serve(self.app()) as self.url:
            self.granted = [SeedAddress("127.0.0.1", service.port, 0), self.honest]
            yield
        await service.stop()

    async def results(self, count: int) -> list[str]:
        """What the receivers reported; reports are sent in the background."""
        deadline = asyncio.get_running_loop().time() + WITHIN_S
        while len(self.reports) < count and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        return sorted(report["RFORK-RESULT"] for report in self.reports)

    def fork(self, order: list[str]) -> ForkSession:
        """Fork into the middle of a buffer, and check it and what lies around it."""
        options = {"rfork_scheduler_url": self.url, "rfork_request_timeout_sec": 5.0, "rfork_become_seed": False}
        session = ForkSession(parse_config(options, {}).settings, KEY, EngineSet(order, EngineConfig(device="cpu")))
        buffer = Buffer("cpu", NBYTES + 2 * PAGE)
        buffer.write(0, AROUND + bytes(NBYTES) + AROUND)
        local = msgspec.structs.replace(
            manifest_of(buffer),
            regions=(Region(buffer.address + PAGE, NBYTES),),
            spans=(Span(0, buffer.address + PAGE, NBYTES),),
        )
        try:
            session.run(Destination(local, Taking, buffer, lambda nbytes: None))
        finally:
            session.close()
            assert buffer.read(0, PAGE) + buffer.read(PAGE + NBYTES, PAGE) == 2 * AROUND
        assert buffer.read(PAGE, NBYTES) == contents()
        return session


@pytest.fixture(scope="module")
def honest() -> Iterator[tuple[SeedAddress, Manifest]]:
    options = {
        "rfork_scheduler_url": "http://127.0.0.1:9",
        "rfork_seed_advertise_host": "127.0.0.1",
        "rfork_engine": "memory,nixl",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.flow.memory_seed", json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert process.stdout is not None
    host, port, rank = json.loads(process.stdout.readline())["address"].split(":")
    address = SeedAddress(host, int(port), int(rank))
    yield address, asyncio.run(SeedClient(request_timeout_s=10.0).manifest(address, KEY, "f1"))
    assert process.poll() is None, "a liar's receiver ended the honest seed"
    process.kill()
    process.communicate()


@pytest.fixture
def made(honest: tuple[SeedAddress, Manifest]) -> Fleet:
    return Fleet(*honest)


def saying(texts: dict[str, str]) -> Altered:
    """Gives the engines of ``texts`` other endpoints."""

    def altered(manifest: Manifest) -> Manifest:
        first, *others = (
            EngineEndpoint(each.engine, texts.get(each.engine, each.endpoint)) for each in manifest.endpoints
        )
        return msgspec.structs.replace(manifest, endpoint=first.endpoint, more_endpoints=tuple(others))

    return altered


def swapped(manifest: Manifest) -> Manifest:
    """Each engine's name with another engine's text."""
    one, other = manifest.endpoints
    return saying({one.engine: other.endpoint, other.engine: one.endpoint})(manifest)


def moved(by: int) -> Altered:
    """Regions and spans at other addresses."""

    def altered(manifest: Manifest) -> Manifest:
        (region,), (span,) = manifest.regions, manifest.spans
        return msgspec.structs.replace(
            manifest,
            regions=(Region(region.address + by, region.nbytes),),
            spans=(msgspec.structs.replace(span, address=span.address + by),),
        )

    return altered


@pytest.mark.parametrize(
    "text", ["", "nonsense", "[" * 1000, "x" * (48 << 20)], ids=["empty", "words", "nested", "long"]
)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order[0])
async def test_an_engine_whose_endpoint_lies_is_followed_by_the_next(made: Fleet, order: list[str], text: str) -> None:
    async with made.liar(saying({order[0]: text})):
        session = await asyncio.to_thread(made.fork, order)
        assert await made.results(1) == ["ok"]
    assert session.engine == order[1]
    assert session.seed != made.honest


@pytest.mark.parametrize(
    "altered",
    [
        pytest.param(swapped, id="engines swapped"),
        pytest.param(saying({"memory": "memory:1:1:4096:" + "00" * 16, "nixl": "{}"}), id="nobody there"),
        pytest.param(moved(1 << 40), id="foreign addresses"),
        pytest.param(moved(64), id="overlapping its end"),
    ],
)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order[0])
async def test_a_seed_that_lies_is_followed_by_the_next(made: Fleet, order: list[str], altered: Altered) -> None:
    async with made.liar(altered):
        session = await asyncio.to_thread(made.fork, order)
        assert await made.results(2) == ["failed", "ok"]
    assert session.seed == made.honest
    assert session.engine == order[0]


async def test_when_all_seeds_lie_nothing_around_the_memory_is_written(made: Fleet) -> None:
    async with made.liar(moved(64)):
        made.granted.pop()
        with pytest.raises(ForkError):
            await asyncio.to_thread(made.fork, ["memory", "nixl"])
