"""The seed client believes nothing that a seed says before it has been checked."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from aiohttp import web

from tests.unit.interop_planners import free_port, raw_server, serve
from vllm_rfork.clients import SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.manifest.codec import MAX_MANIFEST_NBYTES, encode_manifest
from vllm_rfork.manifest.schema import Manifest, Region, Span, TensorEntry
from vllm_rfork.messages import SeedAddress

KEY = "/models/café$prod$kv_both$0$0&x=1"
FINGERPRINT = "f" * 64
TEST_LIMIT_S = 120.0

MANIFEST = Manifest(
    seed_key=KEY,
    fingerprint=FINGERPRINT,
    epoch="e1",
    layout="checkpoint",
    engine="memory",
    endpoint="10.0.0.1:5000",
    regions=(Region(4096, 64),),
    spans=(Span(0, 4096, 64, "d1"),),
    tensors=(TensorEntry("w", "float32", (4, 4), (4, 1), 0),),
)


def address_of(url: str) -> SeedAddress:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return SeedAddress(parts.hostname, parts.port, 0)


@contextlib.asynccontextmanager
async def seed(answers: dict[str, web.Response]) -> AsyncIterator[tuple[SeedAddress, list[web.Request]]]:
    """A seed service with canned answers by path; anything else is 404."""
    seen: list[web.Request] = []

    async def handle(request: web.Request) -> web.Response:
        seen.append(request)
        canned = answers.get(request.path)
        if canned is None:  # a response is a mapping, and an empty one false, in older versions of aiohttp
            return web.Response(status=404, text='{"detail":"Not Found"}')
        # A response object can be sent once.
        kept = {name: value for name, value in canned.headers.items() if name != "Content-Length"}
        return web.Response(status=canned.status, body=canned.body, headers=kept)

    app = web.Application()
    app.router.add_get("/{tail:.*}", handle)
    async with serve(app) as url:
        yield address_of(url), seen


def manifest_answer(manifest: Manifest = MANIFEST) -> dict[str, web.Response]:
    return {"/rfork_manifest": web.Response(body=encode_manifest(manifest))}


async def test_the_manifest_arrives_as_it_was_sent() -> None:
    async with seed(manifest_answer()) as (address, seen):
        assert await SeedClient(token="t").manifest(address, KEY, FINGERPRINT) == MANIFEST
    assert seen[0].query["seed_key"] == KEY
    assert seen[0].query["version"] == "1"
    assert seen[0].headers["RFORK-FINGERPRINT"] == FINGERPRINT
    assert seen[0].headers["Authorization"] == "Bearer t"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed_key": "another"}, "another"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"version": 99}, "version"),
        ({"version": 0}, "version"),
        ({"spans": (Span(0, 4096, 65),)}, "region"),
        ({"spans": (Span(0, 4000, 64),)}, "region"),
        ({"spans": (Span(1, 4096, 64),)}, "region"),
        ({"regions": (Region(4096, 64), Region(4100, 64))}, "overlapping"),
        ({"regions": (Region(-1, 64),)}, "region"),
        ({"regions": (Region((1 << 63) - 8, 64),)}, "region"),
        ({"tensors": (MANIFEST.tensors[0], MANIFEST.tensors[0])}, "twice"),
        ({"tensors": (TensorEntry("w", "float32", (4, 4), (1,), 0),)}, "shape"),
        ({"tensors": (TensorEntry("w", "float32", (4,), (1,), 0, 64),)}, "outside"),
        ({"tensors": (TensorEntry("w", "float32", (4,), (1,), 7),)}, "span"),
    ],
)
async def test_a_manifest_that_lies_or_contradicts_itself_is_refused(change: dict[str, Any], says: str) -> None:
    async with seed(manifest_answer(msgspec.structs.replace(MANIFEST, **change))) as (address, _):
        with pytest.raises(SeedError, match=says) as caught:
            await SeedClient().manifest(address, KEY, FINGERPRINT)
    assert caught.value.retry_elsewhere


BODIES = {
    "empty": b"",
    "html": b"<html>",
    "a list": b"[1]",
    "another type": b'{"seed_key": 5}',
    "fields missing": b"{}",
    "too deep": b'{"state":' * 100_000,
    "not UTF-8": b'{"seed_key": "\xff"}',
    "endless number": b'{"version": ' + b"9" * 100_000 + b"}",
    "gzip": b"\x1f\x8b\x08\x00" + b"\x00" * 50,
}


@pytest.mark.parametrize("body", list(BODIES.values()), ids=list(BODIES))
async def test_a_malformed_manifest_is_the_seeds_fault(body: bytes) -> None:
    async with seed({"/rfork_manifest": web.Response(body=body)}) as (address, _):
        with pytest.raises(SeedError, match="manifest"):
            await SeedClient().manifest(address, KEY, FINGERPRINT)


async def test_a_compressed_answer_is_not_unpacked() -> None:
    """A bomb of a few kilobytes must not become gigabytes; the client never asked for compression."""
    answer = web.Response(body=b"\x1f\x8b" + b"\x00" * 100, headers={"Content-Encoding": "gzip"})
    async with seed({"/rfork_manifest": answer}) as (address, seen):
        with pytest.raises(SeedError, match="cannot be read"):
            await SeedClient().manifest(address, KEY, FINGERPRINT)
    assert seen[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("framing", [b"Content-Length: 99999999999\r\n\r\n", b"\r\n"], ids=["announced", "endless"])
async def test_a_huge_manifest_is_cut_off(framing: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 1024 * 1024
    monkeypatch.setattr("vllm_rfork.clients.seed.MAX_MANIFEST_NBYTES", bound)
    reply = b"HTTP/1.1 200 OK\r\n" + framing + b" " * (2 * bound)
    async with raw_server(reply, then="hang") as url:
        with pytest.raises(SeedError, match=f"more than {bound} bytes"):
            await SeedClient(request_timeout_s=TEST_LIMIT_S).manifest(address_of(url), KEY, FINGERPRINT)
    assert bound < MAX_MANIFEST_NBYTES


async def test_a_manifest_that_breaks_off_is_an_error_not_a_short_manifest() -> None:
    body = encode_manifest(MANIFEST)
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(body) + 10) + body
    async with raw_server(reply) as url:
        with pytest.raises(SeedError, match="failed"):
            await SeedClient().manifest(address_of(url), KEY, FINGERPRINT)


async def test_a_legacy_seed_is_named_as_one() -> None:
    async with seed({}) as (address, _):
        with pytest.raises(SeedError, match="legacy seed"):
            await SeedClient().manifest(address, KEY, FINGERPRINT)


@pytest.mark.parametrize("status", [400, 401, 409, 500, 302])
async def test_a_refusal_carries_the_seeds_words_shortened_and_printable(status: int) -> None:
    answer = web.Response(status=status, text="asleep\x1b[31m since level 1 " + "x" * 3000)
    async with seed({"/rfork_manifest": answer}) as (address, _):
        with pytest.raises(SeedError, match=rf"{status}.*asleep.*since level 1") as caught:
            await SeedClient().manifest(address, KEY, FINGERPRINT)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


async def test_the_epoch_is_confirmed_or_refused() -> None:
    async with seed({"/rfork_epoch": web.json_response({"status": "ok", "epoch": "e1"})}) as (address, seen):
        await SeedClient().confirm_epoch(address, KEY, "e1")
        with pytest.raises(SeedError, match=r"epoch 'e1'.*'e0'"):
            await SeedClient().confirm_epoch(address, KEY, "e0")
    assert seen[0].query["seed_key"] == KEY


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(status=409, text="withdrawn"),
        web.Response(status=404),
        web.Response(body=b"ok"),
        web.Response(body=b'{"epoch": 5}'),
        web.Response(body=b'{"epoch": "' + b"e" * 100_000 + b'"}'),
    ],
    ids=["withdrawn", "no such call", "no JSON", "a number", "huge"],
)
async def test_no_clear_answer_is_no_confirmation(answer: web.Response) -> None:
    async with seed({"/rfork_epoch": answer}) as (address, _):
        with pytest.raises(SeedError):
            await SeedClient().confirm_epoch(address, KEY, "e1")


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (400, False)])
async def test_health_says_whose_seed_it_is(status: int, healthy: bool) -> None:
    async with seed({"/health_check_with_key": web.Response(status=status)}) as (address, seen):
        assert await SeedClient().healthy(address, KEY) is healthy
    assert seen[0].query["seed_key"] == KEY


async def test_a_service_that_is_no_seed_is_not_called_another_seed() -> None:
    async with seed({}) as (address, _):
        with pytest.raises(SeedError, match="404"):
            await SeedClient().healthy(address, KEY)


@pytest.mark.parametrize("call", ["manifest", "epoch", "health"])
@pytest.mark.parametrize(
    "behaviour",
    [
        {"reply": b"", "then": "hang"},
        {"reply": b"HTTP/1.1 200 OK\r\nContent-Le", "then": "hang"},
        {"reply": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 4000, "chunk_pause_s": 0.05},
    ],
    ids=["silent", "stops in the headers", "dribbles"],
)
async def test_every_call_is_bounded_in_total(call: str, behaviour: dict[str, Any]) -> None:
    async with raw_server(**behaviour) as url:
        with pytest.raises(SeedError, match="within"):
            await asyncio.wait_for(calls(SeedClient(request_timeout_s=0.3), address_of(url))[call](), TEST_LIMIT_S)


async def test_a_body_that_stalls_is_bounded_too() -> None:
    async with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", then="hang") as url:
        client = SeedClient(request_timeout_s=0.3)
        with pytest.raises(SeedError, match="within"):
            await asyncio.wait_for(client.manifest(address_of(url), KEY, FINGERPRINT), TEST_LIMIT_S)


@pytest.mark.parametrize("call", ["manifest", "epoch", "health"])
async def test_a_seed_that_is_gone_is_a_seed_error(call: str) -> None:
    with pytest.raises(SeedError, match="seed http://127"):
        await calls(SeedClient(), SeedAddress("127.0.0.1", free_port(), 0))[call]()


def calls(client: SeedClient, address: SeedAddress) -> dict[str, Callable[[], Awaitable[object]]]:
    return {
        "manifest": lambda: client.manifest(address, KEY, FINGERPRINT),
        "epoch": lambda: client.confirm_epoch(address, KEY, "e1"),
        "health": lambda: client.healthy(address, KEY),
    }
