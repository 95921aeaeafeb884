"""A seed of the same key with another fingerprint is not a cold start: the log names the facts that differ."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping

import pytest
from aiohttp import web

from tests.flow.memory_seed import KEY, NBYTES, manifest_of
from tests.unit.interop_planners import serve
from tests.unit.virtual_time import until
from vllm_rfork.clients import PlannerClient
from vllm_rfork.config import parse_config
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.errors import ForkError, NoSeedAvailable
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.session import Destination, ForkSession
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.app import PlannerProcess
from vllm_rfork.planner.http.auth import Tokens
from vllm_rfork.planner.settings import settings_from
from vllm_rfork.seed_service import SeedService
from vllm_rfork.selftest.buffers import Buffer

OWN = {"options.model.dtype": "bfloat16", "hf_config.tie_word_embeddings": "true", "torch": "2.9"}


def session_at(url: str) -> ForkSession:
    options = {"rfork_scheduler_url": url, "rfork_become_seed": False, "rfork_request_timeout_sec": 10.0}
    return ForkSession(parse_config(options, {}).settings, KEY, EngineSet(["memory"], EngineConfig(device="cpu")), OWN)


@contextlib.asynccontextmanager
async def seed(facts: Mapping[str, str], fingerprint: str) -> AsyncIterator[SeedAddress]:
    manifest = manifest_of(Buffer("cpu", NBYTES))
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    made = Manifest(**{**fields, "fingerprint": fingerprint, "epoch": "e1", "endpoint": "nowhere"})
    service = SeedService(made, bind_host="127.0.0.1", facts=facts)
    try:
        yield SeedAddress("127.0.0.1", await service.start(), 0)
    finally:
        await service.stop()


def planner_that_answers(status: int, headers: Mapping[str, str]) -> web.Application:
    async def get_seed(request: web.Request) -> web.Response:
        return web.Response(status=status, headers=headers)

    async def other(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_get("/get_seed", get_seed)
    app.router.add_route("*", "/{any}", other)
    return app


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "other facts" in each.getMessage()]


async def test_the_facts_that_differ_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    half = {**OWN, "options.model.dtype": "float16"}
    untied = {**OWN, "hf_config.tie_word_embeddings": "false"}
    async with seed(half, "f2") as first, seed(untied, "f3") as second:
        others = f"f2;3;{first}, f3;1;{second}"
        answer = {"RFORK-MISS": "fingerprint", "RFORK-OTHER-FINGERPRINTS": others}
        async with serve(planner_that_answers(404, answer)) as url:
            session = session_at(url)
            for _ in range(2):
                with pytest.raises(NoSeedAvailable, match=r"\(fingerprint: ") as caught:
                    await asyncio.to_thread(session.reserve, "f1")
            assert caught.value.reason == "fingerprint"
            await until(lambda: bool(warnings(caplog)), "the warning")
            await asyncio.to_thread(session.close)
    (line,) = warnings(caplog)
    assert "4 seeds of key" in line
    assert line.endswith("dtype: bfloat16 here, float16 on 3 seeds; tie_word_embeddings: true here, false on 1 seed")


async def test_planner_seed_and_receiver_together(caplog: pytest.LogCaptureFixture) -> None:
    """Without a script in between: the planner's own answer leads to the seed, and that tells its facts."""
    process = PlannerProcess(settings_from({"port": 0}), tokens=Tokens(None, {}))
    async with process.running(), seed({**OWN, "options.model.dtype": "float16"}, "f2") as address:
        await PlannerClient(process.url).announce(KEY, address, fingerprint="f2")
        session = session_at(process.url)
        with pytest.raises(NoSeedAvailable) as caught:
            await asyncio.to_thread(session.reserve, "f1")
        assert caught.value.reason == "fingerprint"
        await until(lambda: bool(warnings(caplog)), "the warning")
        await asyncio.to_thread(session.close)
    assert warnings(caplog)[0].endswith("it was built with other facts: dtype: bfloat16 here, float16 on 1 seed")


async def test_a_seed_that_does_not_tell_its_facts_is_named_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    answer = {"RFORK-MISS": "fingerprint", "RFORK-OTHER-FINGERPRINTS": "f2;1;127.0.0.1:1:0"}
    async with serve(planner_that_answers(404, answer)) as url:
        session = session_at(url)
        with pytest.raises(NoSeedAvailable):
            await asyncio.to_thread(session.reserve, "f1")
        await until(lambda: bool(warnings(caplog)), "the warning")
        await asyncio.to_thread(session.close)
    assert "seed 127.0.0.1:1:0 did not return its facts" in warnings(caplog)[0]


async def test_with_a_planner_that_knows_no_fingerprints_too(caplog: pytest.LogCaptureFixture) -> None:
    """It grants the seed, and that refuses its manifest."""
    async with seed({**OWN, "torch": "2.8"}, "f2") as address:
        grant = {**address.headers(), "USER_ID": "u1"}
        async with serve(planner_that_answers(200, grant)) as url:
            session = session_at(url)

            def fork() -> None:
                target = Destination(manifest_of(Buffer("cpu", NBYTES)), Incoming, None, lambda nbytes: None)
                session.run(target)

            with pytest.raises(ForkError) as caught:
                await asyncio.to_thread(fork)
            assert caught.value.side == "receiver", "nobody's failure"
            await until(lambda: bool(warnings(caplog)), "the warning")
            await asyncio.to_thread(session.close)
    assert warnings(caplog)[0].endswith("torch: 2.9 here, 2.8 on 1 seed")


async def test_other_words_and_broken_entries_harm_nobody() -> None:
    answer = {"RFORK-MISS": "tired", "RFORK-OTHER-FINGERPRINTS": "f2;many;x, ;;, f3;1"}
    async with serve(planner_that_answers(404, answer)) as url:
        session = session_at(url)
        with pytest.raises(NoSeedAvailable) as caught:
            await asyncio.to_thread(session.reserve, "f1")
        assert (caught.value.reason, caught.value.others) == ("", ())
        await asyncio.to_thread(session.close)


class Incoming:
    """Never gets anything."""

    def arrived(self, segments: object) -> None: ...

    def accept(self, manifest: Manifest) -> None: ...

    def close(self) -> None: ...
