"""A fork from a seed that offers several engines, over a real seed service: who carries, who is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.contracts.test_example_engine import EXAMPLES, distribution
from tests.flow.memory_seed import KEY, NBYTES, contents
from tests.flow.test_fork_reports import Fleet, Taking, fleet, target_of
from tests.lane_engines import CALLS, Alpha, Beta, raises, recorded
from vllm_rfork.config import parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, ForkError
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.manifest.schema import EngineEndpoint, Manifest
from vllm_rfork.selftest.buffers import Buffer

__all__ = ["distribution", "recorded"]
REFUSED = EngineError("alpha", "connect", "the seed is on another host; use beta", code="lane", retry_elsewhere=True)


def under_names(*names: str, **lies: str) -> Callable[[Manifest], Manifest]:
    """Offers the seed's endpoint under each of ``names``, or what ``lies`` has for one."""

    def offers(manifest: Manifest) -> Manifest:
        first, *others = (EngineEndpoint(name, lies.get(name, manifest.endpoint)) for name in names)
        return msgspec.structs.replace(
            manifest, engine=first.engine, endpoint=first.endpoint, more_endpoints=tuple(others)
        )

    return offers


def session_at(made: Fleet, *order: str) -> ForkSession:
    options = {"rfork_scheduler_url": made.url, "rfork_request_timeout_sec": 10.0, "rfork_become_seed": False}
    return ForkSession(parse_config(options, {}).settings, KEY, EngineSet(order, EngineConfig(device="cpu")))


async def forked(made: Fleet, *order: str) -> tuple[ForkSession, bytes, dict[str, str]]:
    """The session of a fork, the bytes that arrived, and the report to the planner."""
    session, buffer = session_at(made, *order), Buffer("cpu", NBYTES)
    await asyncio.to_thread(session.run, target_of(buffer))
    report = await made.report()
    await asyncio.to_thread(session.close)
    return session, buffer.read(0, NBYTES), report


@pytest.mark.usefixtures("recorded")
async def test_a_refused_engine_is_followed_by_the_next_and_the_report_names_the_lane(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    Alpha.script["connect"] = raises(REFUSED)
    async with fleet(under_names("beta", "alpha")) as made:
        session, found, report = await forked(made, "alpha", "beta")
    assert found == contents()
    assert (session.engine, session.lane, report["RFORK-LANE"]) == ("beta", "beta/straight", "beta/straight")
    assert report["RFORK-RESULT"] == "ok"
    assert sum("use beta" in record.getMessage() for record in caplog.records) == 1
    assert CALLS.index("alpha connect") < CALLS.index("beta connect")
    assert "alpha read" not in CALLS


@pytest.mark.usefixtures("recorded")
async def test_a_seed_of_the_one_engine_form_is_read_by_a_worker_with_several() -> None:
    async with fleet() as made:
        session, found, report = await forked(made, "alpha", "memory", "beta")
    assert (found, session.engine, report["RFORK-LANE"]) == (contents(), "memory", "memory")
    assert not [call for call in CALLS if call != "alpha open" and call != "alpha close"]


async def test_two_engines_of_two_distributions(distribution: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(distribution))
    other = engine_class("procmem")()
    other.open(EngineConfig(device="cpu"))

    def offers(manifest: Manifest) -> Manifest:
        other.register(manifest.regions)
        return msgspec.structs.replace(manifest, more_endpoints=(EngineEndpoint("procmem", other.endpoint),))

    try:
        for order in (("procmem", "memory"), ("memory", "procmem")):
            async with fleet(offers) as made:
                session, found, _ = await forked(made, *order)
                assert (found, session.engine) == (contents(), order[0])
            other.close()
            other.open(EngineConfig(device="cpu"))
    finally:
        other.close()


@pytest.mark.usefixtures("recorded")
async def test_when_no_lane_leads_to_a_seed_its_error_names_all_and_nothing_was_written() -> None:
    Alpha.script["connect"] = raises(REFUSED)
    async with fleet(under_names("alpha", "beta", beta="memory:1:2:3:zz")) as made:
        session, buffer = session_at(made, "alpha", "beta"), Buffer("cpu", NBYTES)
        with pytest.raises(EngineError, match=r"use beta; .*is not an endpoint") as caught:
            await asyncio.to_thread(session.run, target_of(buffer))
        report = await made.report()
        await asyncio.to_thread(session.close)
    assert caught.value.retry_elsewhere
    assert not session.has_written
    assert buffer.read(0, NBYTES) == bytes(NBYTES)
    assert (report["RFORK-CAUSE"], report["RFORK-SIDE"]) == ("EngineError", "unknown")


@pytest.mark.usefixtures("recorded")
async def test_a_seed_out_of_reach_is_given_back_before_the_model_is_built_for_it() -> None:
    Alpha.obstacle = Beta.obstacle = "the seed is on another host"
    async with fleet(under_names("alpha", "beta")) as made:
        session = session_at(made, "alpha", "beta")
        await asyncio.to_thread(session.reserve, "f1")
        with pytest.raises(EngineError, match=r"alpha: connect failed \[lane\].*beta: connect failed \[lane\]"):
            await asyncio.to_thread(session.peek, "f1")
        report = await made.report()
        await asyncio.to_thread(session.close)
    assert (report["RFORK-CAUSE"], report["RFORK-SIDE"]) == ("EngineError", "receiver")
    assert not [call for call in CALLS if call.endswith(("register", "connect"))]


@pytest.mark.usefixtures("recorded")
async def test_a_read_that_fails_is_not_repeated_by_another_engine() -> None:
    """The memory has been written to by then; another seed may be tried, and then storage."""
    Alpha.script["read"] = raises(EngineError("alpha", "read", "cut", in_flight=True, retry_elsewhere=True))
    async with fleet(under_names("alpha", "beta")) as made:
        made.granted *= 2
        session = session_at(made, "alpha", "beta")
        with pytest.raises(EngineError, match="cut") as caught:
            await asyncio.to_thread(session.run, target_of(Buffer("cpu", NBYTES)))
        assert "alpha close" in CALLS
        await asyncio.to_thread(session.close)
        assert len(made.granted) == 1, "bytes may be in flight: no other seed"
    assert (caught.value.retry_elsewhere, session.has_written) == (False, True)
    assert "beta connect" not in CALLS


@pytest.mark.usefixtures("recorded")
async def test_a_fork_that_fails_its_verification_leaves_all_engines_to_the_next_seed() -> None:
    Alpha.script["connect"] = raises(REFUSED)
    async with fleet(under_names("alpha", "beta")) as made:
        session = session_at(made, "alpha", "beta")
        target = target_of(Buffer("cpu", NBYTES), lambda: Taking(accept=ForkError("a digest differs")))
        with pytest.raises(ForkError, match="a digest differs"):
            await asyncio.to_thread(session.run, target)
        assert {name for name in ("alpha", "beta") if f"{name} close" in CALLS} == set()
        await asyncio.to_thread(session.close)
    assert {name for name in ("alpha", "beta") if f"{name} close" in CALLS} == {"alpha", "beta"}
