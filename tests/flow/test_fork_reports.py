"""What a receiver reports of a fork when it releases its lease: seconds, bytes, lane, cause, whose failure."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from tests.flow.granting_planner import GrantingPlanner
from tests.flow.memory_seed import NBYTES, contents, digest_of, manifest_of, session_of
from tests.unit.interop_planners import serve
from vllm_rfork.clients import SeedClient
from vllm_rfork.config import parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import FAULT_VARIABLE, MemoryEngine
from vllm_rfork.errors import ForkError, SeedError, VerificationError
from vllm_rfork.fork.session import Destination, ForkSession
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.messages import SeedAddress
from vllm_rfork.seed_service import SeedService
from vllm_rfork.selftest.buffers import Buffer

WITHIN_S = 60.0


class Taking:
    """Takes the bytes; raises what a test asks for."""

    def __init__(self, arrived: BaseException | None = None, accept: BaseException | None = None) -> None:
        self._arrived, self._accept = arrived, accept

    def arrived(self, segments: Sequence[Segment]) -> None:
        if self._arrived is not None:
            raise self._arrived

    def accept(self, manifest: Manifest) -> None:
        if self._accept is not None:
            raise self._accept

    def close(self) -> None: ...


class Fleet(GrantingPlanner):
    """One seed of this process, and a planner that grants it once."""

    def __init__(self, offers: Callable[[Manifest], Manifest]) -> None:
        super().__init__()
        self.buffer = Buffer("cpu", NBYTES)
        self.buffer.write(0, contents())
        self.engine = MemoryEngine()
        self.engine.open(EngineConfig(device="cpu"))
        manifest = manifest_of(self.buffer, digest_of(self.buffer))
        self.engine.register(manifest.regions)
        served = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
        made = Manifest(**{**served, "epoch": "e1", "endpoint": self.engine.endpoint})
        self.service = SeedService(offers(made), bind_host="127.0.0.1")
        self.url = ""

    def session(self) -> ForkSession:
        return session_of(
            parse_config(
                {"rfork_scheduler_url": self.url, "rfork_request_timeout_sec": 10.0, "rfork_become_seed": False}, {}
            ).settings
        )

    async def report(self) -> dict[str, str]:
        await asyncio.wait_for(self.reported.wait(), WITHIN_S)
        return self.reports[0]


@contextlib.asynccontextmanager
async def fleet(offers: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> AsyncIterator[Fleet]:
    """A fleet whose seed publishes what ``offers`` makes of the manifest of its one engine."""
    made = Fleet(offers)
    made.granted = [SeedAddress("127.0.0.1", await made.service.start(), 0)]
    async with serve(made.app()) as made.url:
        yield made
    await made.service.stop()
    made.engine.close()


def target_of(buffer: Buffer, sink: Callable[[], Any] = Taking) -> Destination:
    return Destination(manifest_of(buffer), sink, buffer, lambda nbytes: None)


async def failed(made: Fleet, sink: Callable[[], Any] = Taking) -> dict[str, str]:
    """The report on a fork that is to fail."""
    session = made.session()
    with pytest.raises(ForkError):
        await asyncio.to_thread(session.run, target_of(Buffer("cpu", NBYTES), sink))
    found = await made.report()
    await asyncio.to_thread(session.close)
    assert found["RFORK-RESULT"] == "failed"
    return found


async def test_a_fork_reports_its_own_time_and_not_the_leases() -> None:
    """In the runtime layout post-processing of dummy weights lies between the lease and the fork."""
    async with fleet() as made:
        session = made.session()
        await asyncio.to_thread(session.reserve, "f1")
        await asyncio.sleep(1.0)  # the post-processing
        began = time.monotonic()
        await asyncio.to_thread(session.run, target_of(Buffer("cpu", NBYTES)))
        took_s = time.monotonic() - began
        found = await made.report()
        await asyncio.to_thread(session.close)
    assert 0 < float(found["RFORK-SECONDS"]) <= took_s + 0.001  # three decimals on the wire
    assert found["RFORK-NBYTES"] == str(NBYTES)
    assert (found["RFORK-RESULT"], found["RFORK-LANE"]) == ("ok", "memory")
    assert not {"RFORK-CAUSE", "RFORK-SIDE"} & set(found)
    stages = str(session.times)
    assert re.search(r"\bengine \d+\.\d{3} s \(overlapped\)", stages), stages
    assert re.search(r"\bplanner \d+\.\d{3} s \(before\)", stages), stages
    assert all(re.fullmatch(r"[a-z ]+ \d+\.\d{3} s( \(\w+\))?", each) for each in stages.split(", ")), stages


@pytest.mark.parametrize(
    ("fault", "written"),
    [
        ("register_fails", False),
        ("connect_fails", False),
        ("the seed is gone", False),
        ("another epoch", False),
        ("stall_read=1", True),
        ("fail_read=1", True),
    ],
)
async def test_memory_may_be_written_from_the_first_read_on(
    fault: str, written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the bytes are what they were, and the model can be loaded as it stands."""
    async with fleet() as made:
        if "=" in fault or "fails" in fault:
            monkeypatch.setenv(FAULT_VARIABLE, fault)
        elif fault == "another epoch":
            monkeypatch.setattr(SeedClient, "confirm_epoch", refused)
        else:
            await made.service.stop()
        buffer = Buffer("cpu", NBYTES)
        session = made.session()
        with pytest.raises(ForkError):
            await asyncio.to_thread(session.run, target_of(buffer))
        await asyncio.to_thread(session.close)
    assert session.has_written is written
    if not written:
        assert buffer.read(0, NBYTES) == bytes(NBYTES)


async def refused(*args: Any) -> None:
    raise SeedError("another epoch")


@pytest.mark.parametrize(
    ("fault", "side"), [("register_fails", "receiver"), ("connect_fails", "unknown"), ("fail_read=1", "unknown")]
)
async def test_an_engines_failure_reports_its_side(fault: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet() as made:
        monkeypatch.setenv(FAULT_VARIABLE, fault)
        found = await failed(made)
    assert (found["RFORK-CAUSE"], found["RFORK-SIDE"]) == ("EngineError", side)


async def test_a_seed_that_has_closed_its_engine_is_to_blame() -> None:
    async with fleet() as made:
        made.engine.close()
        found = await failed(made)
    assert (found["RFORK-CAUSE"], found["RFORK-SIDE"]) == ("EngineError", "seed")


async def test_a_seed_that_does_not_answer_is_to_blame() -> None:
    async with fleet() as made:
        await made.service.stop()
        found = await failed(made)
    assert (found["RFORK-CAUSE"], found["RFORK-SIDE"]) == ("SeedError", "seed")


async def test_wrong_bytes_are_the_seeds_and_memory_that_runs_out_is_the_receivers() -> None:
    async with fleet() as made:
        found = await failed(made, lambda: Taking(accept=VerificationError("a digest differs")))
    assert (found["RFORK-CAUSE"], found["RFORK-SIDE"]) == ("VerificationError", "seed")
    assert found["RFORK-NBYTES"] == str(NBYTES), "that many had been copied"
    async with fleet() as made:
        found = await failed(made, lambda: Taking(arrived=MemoryError()))
    assert (found["RFORK-CAUSE"], found["RFORK-SIDE"]) == ("MemoryError", "receiver")


async def test_the_same_long_text_is_not_logged_twice(caplog: pytest.LogCaptureFixture) -> None:
    """A seed that failed is reported at once; where no other comes, the fallback refers to that line."""
    long = "; ".join(f"span {number}: digest 0f0f here, f0f0 on the seed" for number in range(20))
    async with fleet() as made:
        session = made.session()
        broken = target_of(Buffer("cpu", NBYTES), lambda: Taking(accept=VerificationError(long)))
        with pytest.raises(VerificationError) as caught:
            await asyncio.to_thread(session.run, broken)
        await made.report()
        told = session.logged.once(caught.value)
        await asyncio.to_thread(session.close)
    assert sum(long in record.getMessage() for record in caplog.records) == 1
    assert long not in told
    assert told.startswith("span 0: digest")
