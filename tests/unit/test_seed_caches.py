"""The calls for a seed's caches over real sockets: who gets which bytes, and at whose cost."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.sockets import read_all
from tests.unit.cache_seeds import CONTENTS, held, installed, offered
from tests.unit.test_clients_seed import seed
from tests.unit.test_seed_service import (
    KEY,
    TOKEN,
    begun,
    get,
    manifest,
    opened,
    resident_nbytes,
    serving,
    slow_reader,
    until,
)
from vllm_rfork import messages
from vllm_rfork.caches.collector import collect
from vllm_rfork.caches.manifest import Artifact, ArtifactFile, Offer, encode_offer
from vllm_rfork.caches.offered import Offered, OfferedArtifact
from vllm_rfork.clients import SeedClient
from vllm_rfork.clients.seed_caches import SeedCaches
from vllm_rfork.errors import SeedBusy, SeedError
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.connection import Phase
from vllm_rfork.net.server import Bounds
from vllm_rfork.seed_service import MAX_SENDING, MAX_SENDING_SMALL, SMALL_NBYTES, SeedService

MIB = 1024 * 1024


@contextlib.asynccontextmanager
async def caching(*artifacts: OfferedArtifact, **options: Any) -> AsyncIterator[SeedService]:
    present = offered(*artifacts)
    async with serving(caches=lambda: present, **options) as service:
        yield service


def address_of(service: SeedService) -> SeedAddress:
    return SeedAddress("127.0.0.1", service.port, 0)


async def test_what_a_seed_has_collected_is_installed_by_a_receiver(tmp_path: Path) -> None:
    for path, data in CONTENTS.items():
        (tmp_path / "seed" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "seed" / path).write_bytes(data)
    collected = collect(tmp_path / "seed", kind="model_info", name="all", identity={"vllm": "0.26.0"}, seconds=2.5)
    present = Offered((collected,), {"a": "b"})
    async with serving(caches=lambda: present) as service:
        offer = await SeedCaches().offer(address_of(service), KEY)
        assert offer == Offer((collected.artifact,), {"a": "b"})
        assert await installed(tmp_path / "receiver", address_of(service)) == CONTENTS


async def test_before_the_caches_are_collected_the_receiver_is_asked_to_return() -> None:
    now: list[Offered | None] = [None]
    async with serving(caches=lambda: now[0]) as service:
        client = SeedCaches()
        assert await client.offer(address_of(service), KEY) is None
        assert (await get(service, messages.SEED_CACHE, kind="model_info", name="x"))[0] == 404
        now[0] = offered()
        assert await client.offer(address_of(service), KEY) == Offer((), {"options.dtype": "bfloat16"})
        now[0] = offered(held())
        offer = await client.offer(address_of(service), KEY)
        assert offer is not None
        assert len(offer.artifacts) == 1


async def test_a_list_is_encoded_once_however_many_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Offer] = []

    def encode(offer: Offer) -> bytes:
        encoded.append(offer)
        return encode_offer(offer)

    monkeypatch.setattr("vllm_rfork.seed_service.encode_offer", encode)
    now = [offered(held())]
    async with serving(caches=lambda: now[0]) as service:
        first = [await get(service, messages.SEED_CACHES) for _ in range(5)]
        assert len(encoded) == 1
        now[0] = offered()
        assert await get(service, messages.SEED_CACHES) not in first


async def test_a_seed_without_caches_answers_as_an_older_one() -> None:
    async with serving() as service:
        assert await get(service, messages.SEED_CACHES) == await get(service, "/rfork_next_year")
        assert await SeedCaches().offer(address_of(service), KEY) == Offer(())
    async with seed({}) as (older, _):
        assert await SeedCaches().offer(older, KEY) == Offer(())
        with pytest.raises(SeedError, match="404"):
            await SeedCaches().fetch(older, KEY, held().artifact, lambda piece: None, timeout_s=5.0)


async def test_an_older_receiver_is_paired_with_a_seed_that_has_caches() -> None:
    async with caching(held()) as service:
        client = SeedClient()
        assert await client.manifest(address_of(service), KEY, "f1") == manifest()
        await client.confirm_epoch(address_of(service), KEY, "epoch-1")


async def test_a_suspended_seed_still_sends_its_caches(tmp_path: Path) -> None:
    async with caching(held()) as service:
        service.suspend("sleep")
        assert await installed(tmp_path, address_of(service)) == CONTENTS
        with pytest.raises(SeedError, match="sleep"):
            await SeedClient().manifest(address_of(service), KEY, "f1")


async def test_a_request_that_names_no_artifact_of_the_list_is_refused() -> None:
    async with caching(held()) as service:
        requests: list[tuple[dict[str, str], int]] = [
            ({}, 400),
            ({"kind": "model_info"}, 400),
            ({"kind": "model_info", "name": "other"}, 404),
            ({"kind": "model_info", "name": "../../etc/passwd"}, 404),
            ({"kind": "../model_info", "name": "Qwen2ForCausalLM"}, 404),
            ({"kind": "", "name": ""}, 404),
        ]
        for more, status in requests:
            assert (await get(service, messages.SEED_CACHE, **more))[0] == status
        two = f"http://127.0.0.1:{service.port}{messages.SEED_CACHE}?seed_key={KEY}&kind=a&name=b&name=c"
        async with aiohttp.ClientSession() as session, session.get(two.replace("$", "%24")) as response:
            assert response.status == 400


async def test_a_head_request_gets_the_length_and_occupies_nothing() -> None:
    source = Endless(4 * MIB)
    async with caching(source) as service:
        url = f"http://127.0.0.1:{service.port}{messages.SEED_CACHE}"
        query = {"seed_key": KEY, "kind": "model_info", "name": "big"}
        async with aiohttp.ClientSession() as session:
            for _ in range(MAX_SENDING + 1):
                async with session.head(url, params=query) as response:
                    assert response.status == 200
                    assert response.content_length == 4 * MIB
                    assert response.headers["Content-Type"] == "application/octet-stream"
    assert source.made == 0


# --- strangers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [messages.SEED_CACHES, messages.SEED_CACHE])
async def test_a_stranger_gets_neither_list_nor_bytes(path: str) -> None:
    names = {"kind": "model_info", "name": "Qwen2ForCausalLM"}
    async with caching(held(), token=TOKEN) as service:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
            status, text = await get(service, path, headers=headers, **names)
            assert status == 401
            assert "Qwen2" not in text
        admitted = {"Authorization": f"Bearer {TOKEN}"}
        assert (await get(service, path, key="another", headers=admitted, **names))[0] == 400
        assert (await get(service, path, key=None, headers=admitted, **names))[0] == 400
        assert (await get(service, path, headers=admitted, **names))[0] == 200
        with pytest.raises(SeedError, match="401"):
            await SeedCaches().offer(address_of(service), KEY)


async def test_token_and_key_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    genuine = hmac.compare_digest

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return genuine(one, other)

    monkeypatch.setattr("vllm_rfork.net.bearer.hmac.compare_digest", compare_digest)
    async with caching(held(), token=TOKEN) as service:
        compared.clear()
        await get(service, messages.SEED_CACHES, headers={"Authorization": "Bearer guess"})
        assert compared == [(b"guess", TOKEN.encode())]
        await get(service, messages.SEED_CACHE, key="guess", headers={"Authorization": f"Bearer {TOKEN}"})
        assert (b"guess", KEY.encode()) in compared


# --- bytes that end early --------------------------------------------------------------------------------------------


async def test_a_file_that_has_changed_breaks_the_answer_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "x").write_bytes(b"1" * 3 * MIB)
    collected = collect(tmp_path / "seed", kind="model_info", name="all", identity={"vllm": "0.26.0"})
    present = Offered((collected,), {})
    (tmp_path / "seed" / "x").write_bytes(b"2" * 3 * MIB)
    async with serving(caches=lambda: present) as service:
        with pytest.raises(SeedError, match="failed"):
            await installed(tmp_path / "receiver", address_of(service))
        assert os.listdir(tmp_path / "receiver") == [".rfork-staging-" + str(os.geteuid())]
        assert "has changed since it was collected" in caplog.text
        assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ((b"short",), "fewer than 400006 bytes"),
        ((b"x" * 600_000,), "more than 400006 bytes"),
        ((b"x" * 399_000, b"y" * 399_000), "more than 400006 bytes"),
        ((), "fewer than 400006 bytes"),
    ],
)
async def test_a_source_of_another_length_breaks_the_answer_off(
    sent: tuple[bytes, ...],
    says: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_rfork.net.server.failure_logger.filters", [])
    async with caching(held(sent=sent)) as service:
        with pytest.raises(SeedError):
            await SeedCaches().fetch(address_of(service), KEY, held().artifact, lambda piece: None, timeout_s=20.0)
        await until(lambda: opened(service) == 0)
    assert f"there are {says}" in caplog.text


class Endless:
    """An artifact with a size of its own, made while it is sent; ``gate`` holds it at the second piece."""

    def __init__(self, nbytes: int, gate: threading.Event | None = None) -> None:
        self.artifact = Artifact("model_info", "big", {"a": "b"}, (ArtifactFile("x", nbytes, "0" * 64),))
        self.gate = gate
        self.made = 0
        self.closed = 0

    def pieces(self) -> Iterator[bytes]:
        try:
            for number in range(self.artifact.nbytes // MIB):
                if number and self.gate is not None:
                    self.gate.wait(60)
                self.made += 1
                yield bytes(MIB)
        finally:
            self.closed += 1


class Stuck:
    """An artifact whose first piece waits for ``gate``."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.gate = artifact, threading.Event()
        self.began: list[int] = []

    def pieces(self) -> Iterator[bytes]:
        self.began.append(1)
        self.gate.wait(60)
        yield b"{}"


def request_for(name: str = "big") -> bytes:
    return f"GET {messages.SEED_CACHE}?seed_key={KEY}&kind=model_info&name={name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def test_four_are_sent_at_once_and_more_are_sent_away(tmp_path: Path) -> None:
    source = Endless(64 * MIB)
    async with caching(source, held()) as service, contextlib.AsyncExitStack() as stack:
        socks = [await stack.enter_async_context(slow_reader(service, request_for())) for _ in range(MAX_SENDING)]
        for sock in socks:
            await begun(sock)
        status, _ = await get(service, messages.SEED_CACHE, kind="model_info", name="Qwen2ForCausalLM")
        assert status == 503
        with pytest.raises(SeedBusy, match="503"):
            await SeedCaches().fetch(address_of(service), KEY, source.artifact, lambda piece: None, timeout_s=5.0)
        assert (await get(service, messages.SEED_CACHES))[0] == 200, "the list needs no place"
        assert (await get(service, messages.SEED_HEALTH))[0] == 200
        socks[0].close()
        await until(lambda: opened(service) < MAX_SENDING)
        await until(lambda: source.closed == 1)
        assert (await get(service, messages.SEED_CACHE, kind="model_info", name="big"))[0] == 200


async def test_small_json_is_sent_while_large_code_is_being_sent() -> None:
    """A front end asks once, and within a second."""
    small = held(name="small", contents={"m.json": b"{}" * (SMALL_NBYTES // 2)})
    waiting = Stuck(held(name="stuck", contents={"m.json": b"{}"}).artifact)
    async with caching(Endless(64 * MIB), small, waiting) as service, contextlib.AsyncExitStack() as stack:
        for _ in range(MAX_SENDING):
            await begun(await stack.enter_async_context(slow_reader(service, request_for())))
        assert (await get(service, messages.SEED_CACHE, kind="model_info", name="small"))[0] == 200
        try:
            for number in range(1, MAX_SENDING_SMALL + 1):
                await stack.enter_async_context(slow_reader(service, request_for("stuck")))
                await until(lambda count=number: len(waiting.began) == count)
            assert (await get(service, messages.SEED_CACHE, kind="model_info", name="small"))[0] == 503
        finally:
            waiting.gate.set()
        await until(lambda: opened(service, Phase.WRITE) == MAX_SENDING)
        assert (await get(service, messages.SEED_CACHE, kind="model_info", name="small"))[0] == 200


async def test_a_receiver_that_does_not_read_is_cut_off_and_costs_little_meanwhile() -> None:
    source = Endless(64 * MIB)
    async with caching(source, bounds=Bounds(answer_timeout_s=1.5)) as service:
        before = resident_nbytes()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(MAX_SENDING):
                await begun(await stack.enter_async_context(slow_reader(service, request_for())))
            assert resident_nbytes() - before < MAX_SENDING * 6 * MIB
            await until(lambda: opened(service) == 0)
            await until(lambda: source.closed == MAX_SENDING)


async def test_a_disk_that_hangs_stops_only_its_own_answer() -> None:
    gate = threading.Event()
    source = Endless(2 * MIB, gate)
    try:
        async with caching(source, bounds=Bounds(answer_timeout_s=1.0)) as service:
            async with slow_reader(service, request_for()) as sock:
                await begun(sock)
                assert (await get(service, messages.SEED_HEALTH))[0] == 200
                await read_all(sock)
            assert opened(service, Phase.WRITE) == 0
            assert source.closed == 0, "its thread waits for the disk"
    finally:
        gate.set()
    await until(lambda: source.closed == 1)


async def test_stopping_the_seed_ends_answers_and_what_they_read_from() -> None:
    source = Endless(64 * MIB)
    async with caching(source) as service, slow_reader(service, request_for()) as sock:
        await begun(sock)
        await service.stop()
        assert len(await read_all(sock)) < 64 * MIB
    await until(lambda: source.closed == 1)


@pytest.mark.long
async def test_four_receivers_of_half_a_gibibyte_cost_a_few_pieces() -> None:
    source = Endless(512 * MIB)
    peak_nbytes = received_nbytes = 0
    async with caching(source) as service:
        before = resident_nbytes()

        def count(piece: bytes) -> None:
            nonlocal peak_nbytes, received_nbytes
            received_nbytes += len(piece)
            peak_nbytes = max(peak_nbytes, resident_nbytes() - before)

        client = SeedCaches()
        calls = [
            client.fetch(address_of(service), KEY, source.artifact, count, timeout_s=60.0) for _ in range(MAX_SENDING)
        ]
        await asyncio.gather(*calls)
    assert received_nbytes == MAX_SENDING * 512 * MIB
    assert peak_nbytes < MAX_SENDING * 8 * MIB, "both sides of all four are in this process"
