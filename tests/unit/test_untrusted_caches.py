"""Seeds that lie about their caches, and lists made of anything: refused in bounded time, and nothing is kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.cache_seeds import CONTENTS, held, installed
from tests.unit.interop_planners import serve
from tests.unit.test_clients_seed import address_of
from tests.unit.test_seed_service import KEY, resident_nbytes
from vllm_rfork import messages
from vllm_rfork.caches import bounds
from vllm_rfork.caches.installer import install
from vllm_rfork.caches.manifest import LEVELS, Artifact, ArtifactFile, Offer, decode_offer, encode_offer
from vllm_rfork.caches.staging import STAGING, Staged
from vllm_rfork.clients.seed_caches import SeedCaches
from vllm_rfork.errors import CacheError, SeedError
from vllm_rfork.messages import SeedAddress

HONEST = held()
BODY = b"".join(HONEST.sent)
JSON = encode_offer(Offer((HONEST.artifact,)))
MIB = 1024 * 1024


@contextlib.asynccontextmanager
async def lying(body: bytes = BODY, listed: bytes = JSON, **behaviour: Any) -> AsyncIterator[SeedAddress]:
    """A seed that sends ``body`` for any artifact.

    ``length`` is the Content-Length that it states; ``endless``, ``pause_s`` (between pieces) and ``breaks_off`` say
    how the body ends.
    """

    async def listing(_: web.Request) -> web.Response:
        return web.Response(body=listed)

    async def artifact(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = behaviour.get("length")
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                for start in range(0, len(body), 65536):
                    await response.write(body[start : start + 65536])
                    await asyncio.sleep(behaviour.get("pause_s", 0))
                if behaviour.get("breaks_off"):
                    assert request.transport is not None
                    request.transport.abort()
                if not behaviour.get("endless"):
                    break
        return response

    app = web.Application()
    app.router.add_get(messages.SEED_CACHES, listing)
    app.router.add_get(messages.SEED_CACHE, artifact)
    async with serve(app) as url:
        yield address_of(url)


def nothing_is_left(root: Path) -> bool:
    return not (root / "cache").exists() and os.listdir(root / STAGING) == []


def with_files(*files: ArtifactFile, kind: str = "model_info") -> bytes:
    """A list that no honest seed could encode."""
    return msgspec.json.encode(Offer((Artifact(kind, "x", {"a": "b"}, files),)))


async def test_this_seed_is_believed_when_it_is_honest(tmp_path: Path) -> None:
    async with lying() as address:
        assert await installed(tmp_path, address) == CONTENTS


@pytest.mark.parametrize(
    ("body", "behaviour"),
    [
        (BODY[:-1] + b"x", {}),
        (b"x" + BODY[1:], {"length": len(BODY)}),
        (BODY[6:] + BODY[:6], {}),
        (BODY[:-1], {}),
        (BODY[:-1], {"length": len(BODY)}),
        (BODY + b"x", {}),
        (BODY + b"x", {"length": len(BODY) + 1}),
        (b"", {}),
        (BODY, {"endless": True}),
        (BODY[:70_000], {"breaks_off": True}),
        (BODY[:70_000], {"breaks_off": True, "length": len(BODY)}),
    ],
    ids=[
        "wrong last byte",
        "wrong first byte",
        "order of files",
        "too short",
        "shorter than stated",
        "too long",
        "too long as stated",
        "nothing",
        "endless",
        "breaks off",
        "breaks off before the stated end",
    ],
)
async def test_bytes_that_are_not_those_of_the_list_leave_nothing(
    body: bytes, behaviour: dict[str, Any], tmp_path: Path
) -> None:
    async with lying(body, **behaviour) as address:
        with pytest.raises((SeedError, CacheError)):
            await installed(tmp_path, address)
        assert nothing_is_left(tmp_path)


async def test_a_body_that_trickles_in_ends_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    async with lying(pause_s=0.2) as address:
        begun = time.monotonic()
        with pytest.raises(SeedError, match=r"no answer within 0\.4 s"):
            await installed(tmp_path, address, timeout_s=0.4)
        assert time.monotonic() - begun < 10
        assert nothing_is_left(tmp_path)


async def test_an_endless_body_is_not_kept(tmp_path: Path) -> None:
    received_nbytes = 0

    def count(piece: bytes) -> None:
        nonlocal received_nbytes
        received_nbytes += len(piece)

    async with lying(b"x" * MIB, endless=True) as address:
        before = resident_nbytes()
        with pytest.raises(SeedError, match="more than 400006 bytes"):
            await SeedCaches().fetch(address, KEY, HONEST.artifact, count, timeout_s=30.0)
        assert received_nbytes == HONEST.artifact.nbytes
        assert resident_nbytes() - before < 16 * MIB


async def test_fewer_bytes_are_an_error_of_the_seed_whatever_the_sink_does() -> None:
    async with lying(BODY[:-1]) as address:
        with pytest.raises(SeedError, match="sent 400005 of the 400006 bytes"):
            await SeedCaches().fetch(address, KEY, HONEST.artifact, lambda piece: None, timeout_s=30.0)


async def test_an_error_of_the_sink_ends_the_exchange() -> None:
    def full(piece: bytes) -> None:
        raise CacheError("the disk is full")

    async with lying(endless=True) as address:
        with pytest.raises(CacheError, match="the disk is full"):
            await SeedCaches().fetch(address, KEY, HONEST.artifact, full, timeout_s=30.0)


@pytest.mark.parametrize(
    "listed",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"artifacts": 3}',
        b'{"artifacts": [{}]}',
        b'{"artifacts": [], "version": 99}',
        b"\xff\xfe",
        b"[" * 100_000,
        JSON[:-1],
        JSON.replace(b"400000", b"-1"),
        JSON.replace(b"400000", b"4e5"),
        JSON.replace(b"400000", b"1e999"),
        JSON.replace(b"400000", b'"400000"'),
        JSON.replace(b'"second"', b'"a/first"'),
        JSON.replace(b'"second"', b'"a"'),
        JSON.replace(b'"second"', b'"../second"'),
        JSON.replace(b'"second"', b'"/etc/cron.d/second"'),
        JSON.replace(b'"second"', b'"s\\u0000"'),
        JSON.replace(b'"sha256":"', b'"sha256":"zz'),
        msgspec.json.encode(Offer((HONEST.artifact, HONEST.artifact))),
        with_files(ArtifactFile("x", bounds.MAX_FILE_NBYTES + 1, "0" * 64)),
        with_files(*(ArtifactFile(f"x{number}", bounds.MAX_FILE_NBYTES, "0" * 64) for number in range(3))),
        with_files(*(ArtifactFile(f"x{number}", 1, "0" * 64) for number in range(bounds.MAX_FILES + 1))),
        with_files(),
    ],
)
async def test_a_list_that_is_not_one_is_refused(listed: bytes) -> None:
    async with lying(listed=listed) as address:
        with pytest.raises(CacheError):
            await SeedCaches().offer(address, KEY)


async def test_a_bundle_of_a_million_files_is_refused_before_it_is_parsed() -> None:
    entry = b'{"path":"f0000000","nbytes":1,"sha256":"' + b"0" * 64 + b'"},'
    listed = b'{"artifacts":[{"kind":"triton","name":"x","identity":{"a":"b"},"files":[' + entry * 1_000_000
    async with lying(listed=listed[:-1] + b"]}]}") as address:
        before, begun = resident_nbytes(), time.monotonic()
        with pytest.raises(SeedError, match=f"more than {bounds.MAX_MANIFEST_NBYTES} bytes"):
            await SeedCaches(request_timeout_s=30.0).offer(address, KEY)
        assert time.monotonic() - begun < 20
        assert resident_nbytes() - before < 64 * MIB


async def test_a_list_that_trickles_in_ends_in_time() -> None:
    async def listing(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(600):
                await response.write(b" ")
                await asyncio.sleep(0.05)
        return response

    app = web.Application()
    app.router.add_get(messages.SEED_CACHES, listing)
    async with serve(app) as url:
        with pytest.raises(SeedError, match=r"no answer within 0\.3 s"):
            await SeedCaches(request_timeout_s=0.3).offer(address_of(url), KEY)


async def test_the_level_is_never_taken_from_the_wire() -> None:
    code = msgspec.json.decode(JSON)
    code["artifacts"][0] |= {"kind": "torch_aot", "level": "safe"}
    async with lying(listed=msgspec.json.encode(code)) as address:
        offer = await SeedCaches().offer(address, KEY)
        assert offer is not None
        assert offer.artifacts == ()


# --- any list, any name ----------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)
FILES = st.lists(st.fixed_dictionaries({"path": ANYTHING, "nbytes": ANYTHING, "sha256": ANYTHING}), max_size=4)
LISTS = st.fixed_dictionaries(
    {
        "artifacts": st.lists(
            st.fixed_dictionaries(
                {
                    "kind": st.sampled_from(sorted(LEVELS)) | ANYTHING,
                    "name": st.just("x") | ANYTHING,
                    "identity": st.just({"a": "b"}) | ANYTHING,
                    "files": FILES | ANYTHING,
                    "seconds": ANYTHING,
                }
            ),
            max_size=3,
        )
        | ANYTHING,
        "details": st.just({}) | ANYTHING,
        "version": st.just(1) | ANYTHING,
    }
)
#: Parts of names as an attacker would choose them, and any other text.
HOSTILE = ["..", ".", "", "/", "~", "-rf", "a" * 200, "a" * 201, "\0", "\n", "c:", "\\", "\u00e9", ".rfork-staging-0"]
USUAL = st.sampled_from(["a", "A", "b.so", "model", "rank_0_0", "__grp__x.json"])
PATHS = st.one_of(
    st.lists(USUAL, min_size=1, max_size=4),
    st.lists(USUAL | st.sampled_from(HOSTILE) | st.text(max_size=8), min_size=1, max_size=15),
).map("/".join)


def refused_or(body: bytes) -> Offer | None:
    try:
        return decode_offer(body)
    except CacheError:
        return None


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300) | LISTS.map(lambda each: msgspec.json.encode(msgspec.to_builtins(each))))
def test_no_list_raises_anything_else(body: bytes) -> None:
    offer = refused_or(body)
    if offer is not None:
        assert decode_offer(encode_offer(offer)) == offer


@settings(max_examples=60, deadline=None)
@given(st.lists(PATHS, min_size=1, max_size=6), st.lists(st.integers(-1, 2**70), min_size=6, max_size=6))
def test_accepted_names_stay_below_their_directory(paths: list[str], sizes: list[int]) -> None:
    files = tuple(ArtifactFile(path, size, "0" * 64) for path, size in zip(paths, sizes, strict=False))
    offer = refused_or(msgspec.json.encode(Offer((Artifact("triton", "x", {"a": "b"}, files),))))
    if offer is None:
        return
    names = [file.path for file in offer.artifacts[0].files]
    assert len(set(names)) == len(names)
    for name in names:
        assert os.path.normpath(name) == name
        assert not os.path.isabs(name)
        assert ".." not in name.split("/")
        assert name.isascii()
        assert name.isprintable()
    assert offer.artifacts[0].nbytes <= bounds.MAX_ARTIFACT_NBYTES


@settings(max_examples=60, deadline=None)
@given(paths=st.lists(PATHS, min_size=1, max_size=4, unique=True), last=st.none() | PATHS)
def test_no_name_makes_the_installer_write_elsewhere(
    paths: list[str], last: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("installed")
    root = outside / "root"
    honest = held(contents={path: path.encode("utf-8", "replace") for path in paths})
    try:
        staged = Staged(root, honest.artifact, kept_free_nbytes=0)
    except CacheError:
        assert not list(root.rglob("*")), "refused before anything was made"
        return
    try:
        staged.write(b"".join(honest.sent))
        staged.finish()
        with contextlib.suppress(CacheError):
            install(staged, ("cache",), last=last)
    finally:
        staged.discard()
    assert os.listdir(outside) == ["root"]
    assert {entry for entry in os.listdir(root) if not entry.startswith(".rfork-")} <= {"cache"}
    found = {path.relative_to(root / "cache").as_posix() for path in (root / "cache").rglob("*") if path.is_file()}
    assert found in (set(), set(paths))
    assert not any(path.is_symlink() for path in root.rglob("*"))
