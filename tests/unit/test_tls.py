"""TLS between workers, and between a worker and its planner: real certificates, real sockets, and what people read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.authority import Authority
from tests.unit.test_seed_service import KEY, TOKEN, get, manifest, serving, until
from vllm_rfork import messages
from vllm_rfork.clients import PlannerClient, SeedClient
from vllm_rfork.errors import PlannerError, SeedError
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.connection import Phase
from vllm_rfork.net.credentials import Credentials, Options
from vllm_rfork.net.server import Bounds
from vllm_rfork.net.tls_errors import advice
from vllm_rfork.planner.app import PlannerProcess
from vllm_rfork.planner.http.auth import Tokens
from vllm_rfork.planner.settings import settings_from
from vllm_rfork.seed_service import SeedService

NAME = "seeds.fleet.example"
SEED = SeedAddress("127.0.0.1", 7001, 0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def worker(authority: Authority) -> tuple[Path, Path]:
    """One certificate for all workers of the fleet: no address in it, a common name."""
    return authority.issue("worker", names=(NAME,))


def own(cert: tuple[Path, Path] | None = None, **more: Any) -> Credentials:
    files = {} if cert is None else {"cert_file": str(cert[0]), "key_file": str(cert[1])}
    return Credentials(Options(**files, **{name: str(value) for name, value in more.items()}))


@pytest.fixture(scope="module")
def fleet(authority: Authority, worker: tuple[Path, Path]) -> Credentials:
    """What every worker of a fleet has that does everything by TLS."""
    return own(
        worker,
        token=TOKEN,
        ca_file=authority.file,
        seed_tls="require",
        seed_name=NAME,
        client_ca_file=authority.file,
    )


async def read(service: SeedService, credentials: Credentials) -> str:
    """The epoch that a receiver with ``credentials`` is told."""
    address = SeedAddress("127.0.0.1", service.port, 0)
    client = SeedClient(credentials=credentials, request_timeout_s=10.0)
    found = await client.manifest(address, KEY, "f1")
    await client.confirm_epoch(address, KEY, found.epoch)
    return found.epoch


# --- seed and receiver -----------------------------------------------------------------------------------------------


async def test_a_fleet_with_one_certificate_reads_from_each_other(fleet: Credentials) -> None:
    async with serving(credentials=fleet) as service:
        assert await read(service, fleet) == "epoch-1"


async def test_a_certificate_for_the_announced_address_needs_no_common_name(authority: Authority) -> None:
    cert = authority.issue("by-address", names=("127.0.0.1",))
    credentials = own(cert, ca_file=authority.file, seed_tls="require")
    async with serving(credentials=credentials, advertised_host="127.0.0.1") as service:
        assert await read(service, credentials) == "epoch-1"


async def test_a_large_manifest_arrives_whole(fleet: Credentials) -> None:
    state = {f"layer.{number}": "x" * 1000 for number in range(3000)}
    async with serving(manifest(state=state), credentials=fleet) as service:
        client = SeedClient(credentials=fleet)
        found = await client.manifest(SeedAddress("127.0.0.1", service.port, 0), KEY, "f1")
        assert found == manifest(state=state)


async def test_a_seed_of_another_ca_is_refused_and_the_message_says_what_to_set(
    fleet: Credentials, stranger: Authority, worker: tuple[Path, Path]
) -> None:
    other = own(worker, token=TOKEN, ca_file=stranger.file, seed_tls="require", seed_name=NAME)
    async with serving(credentials=fleet) as service:
        with pytest.raises(SeedError, match="rfork_tls_ca_file") as caught:
            await read(service, other)
    assert caught.value.retry_elsewhere


async def test_a_seed_under_another_name_is_refused_and_the_message_says_what_to_set(
    fleet: Credentials, authority: Authority, worker: tuple[Path, Path]
) -> None:
    async with serving(credentials=fleet) as service:
        for name in ("", "others.example"):
            nameless = own(worker, token=TOKEN, ca_file=authority.file, seed_tls="require", seed_name=name)
            with pytest.raises(SeedError, match="rfork_seed_tls_name"):
                await read(service, nameless)


async def test_a_receiver_without_a_certificate_is_told_that_one_is_demanded(
    fleet: Credentials, authority: Authority
) -> None:
    bare = own(token=TOKEN, ca_file=authority.file, seed_tls="require", seed_name=NAME)
    async with serving(credentials=fleet) as service:
        with pytest.raises(SeedError, match=r"403 .*rfork_tls_cert_file"):
            await read(service, bare)


async def test_a_receiver_with_a_strangers_certificate_is_not_let_in(
    fleet: Credentials, authority: Authority, stranger: Authority
) -> None:
    foreign = own(
        stranger.issue("stranger", names=(NAME,)),
        token=TOKEN,
        ca_file=authority.file,
        seed_tls="require",
        seed_name=NAME,
    )
    async with serving(credentials=fleet) as service:
        with pytest.raises(SeedError):
            await read(service, foreign)


async def test_certificates_do_not_take_the_place_of_the_token(fleet: Credentials, worker: tuple[Path, Path]) -> None:
    tokenless = own(worker, ca_file=fleet.options.ca_file, seed_tls="require", seed_name=NAME)
    async with serving(credentials=fleet) as service:
        with pytest.raises(SeedError, match="401"):
            await read(service, tokenless)


async def test_a_receiver_that_speaks_http_is_told_so_in_words(fleet: Credentials) -> None:
    async with serving(credentials=fleet) as service:
        for path in (messages.SEED_MANIFEST, messages.SEED_INFO, messages.SEED_FETCH, "/"):
            status, text = await get(service, path, headers={"Authorization": f"Bearer {TOKEN}"})
            assert (status, text) == (426, "this service serves https only")
        with pytest.raises(SeedError, match=r"426 \(this service serves https only\)"):
            await read(service, own(token=TOKEN))


async def test_a_receiver_that_requires_tls_reads_from_no_seed_without(fleet: Credentials) -> None:
    async with serving(token=TOKEN) as service:
        with pytest.raises(SeedError, match="does not use TLS; set rfork_seed_tls to prefer"):
            await read(service, fleet)


async def test_while_tls_is_introduced_everybody_reads_from_everybody(
    authority: Authority, worker: tuple[Path, Path], stranger: Authority
) -> None:
    before = own(token=TOKEN)
    between = own(worker, token=TOKEN, ca_file=authority.file, seed_tls="prefer", seed_name=NAME)
    after = own(worker, token=TOKEN, ca_file=authority.file, seed_tls="require", seed_name=NAME)
    for seed, receivers in (
        (before, [before, between]),
        (between, [before, between, after]),
        (after, [between, after]),
    ):
        async with serving(credentials=seed) as service:
            for receiver in receivers:
                assert await read(service, receiver) == "epoch-1", (seed.options, receiver.options)
    # Falling back is for seeds that speak no TLS, not for those whose certificate is wrong.
    wary = own(worker, token=TOKEN, ca_file=stranger.file, seed_tls="prefer", seed_name=NAME)
    async with serving(credentials=between) as service:
        with pytest.raises(SeedError, match="rfork_tls_ca_file"):
            await read(service, wary)


async def test_a_certificate_that_no_receiver_would_take_is_found_out_at_the_start(
    authority: Authority, stranger: Authority
) -> None:
    """Before the seed is announced, and without waiting for what waiting does not change."""
    for cert, wanted in (
        (stranger.issue("foreign", names=(NAME,)), "rfork_tls_ca_file"),
        (authority.issue("nameless", names=("another.example",)), "rfork_seed_tls_name"),
        (authority.issue("old", names=(NAME,), days=-1), "renew"),
    ):
        credentials = own(cert, ca_file=authority.file, seed_tls="require", seed_name=NAME)
        service = SeedService(manifest(), bind_host="127.0.0.1", credentials=credentials, ready_timeout_s=600.0)
        with pytest.raises(SeedError, match=f"refused by receivers.*{wanted}"):
            await asyncio.wait_for(service.start(), 30)


async def test_a_renewed_certificate_is_shown_to_the_next_caller(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("renewed", names=(NAME,))
    now = [0.0]
    options = Options(
        cert_file=str(cert), key_file=str(key), ca_file=str(authority.file), seed_tls="require", seed_name=NAME
    )
    async with serving(credentials=Credentials(options, lambda: now[0])) as service:
        later = Authority(tmp_path / "later")
        for file, new in zip((cert, key), later.issue("renewed", names=(NAME,)), strict=True):
            file.write_bytes(new.read_bytes())
        now[0] += 1
        assert await read(service, own(ca_file=later.file, seed_tls="require", seed_name=NAME)) == "epoch-1"


# --- the service's bounds hold with TLS as well ----------------------------------------------------------------------


def opened(service: SeedService, *phases: Phase) -> int:
    connections = service._server.connections
    assert connections is not None
    return connections.count(*(phases or tuple(Phase)))


async def drained(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        await reader.read()


@pytest.mark.parametrize("sent", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01", b"GET /", b"\x00" * 100])
async def test_whoever_connects_and_stalls_is_dropped(fleet: Credentials, sent: bytes) -> None:
    async with serving(credentials=fleet, bounds=Bounds(head_timeout_s=0.2)) as service:
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(sent)
        await asyncio.wait_for(drained(reader), 30)
        writer.close()
        await until(lambda: opened(service) == 0)


async def test_stalled_handshakes_count_as_connections_and_lock_nobody_out(fleet: Credentials) -> None:
    async with serving(credentials=fleet, bounds=Bounds(max_connections=2, head_timeout_s=60.0)) as service:
        held = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(8)]
        await until(lambda: opened(service, Phase.OPENING) == 8)
        assert await read(service, fleet) == "epoch-1"
        await asyncio.wait_for(drained(held[0][0]), 30)  # the one that has waited longest made room
        assert opened(service, Phase.OPENING) <= 7
        for _, each in held:
            each.close()
        await until(lambda: opened(service) == 0)


async def test_stopping_leaves_no_task_no_socket_and_no_port(fleet: Credentials) -> None:
    tasks = asyncio.all_tasks()
    async with serving(credentials=fleet) as service:
        stalled = await asyncio.open_connection("127.0.0.1", service.port)
        await until(lambda: opened(service, Phase.OPENING) == 1)
        context = fleet.client_context()
        open_too = await asyncio.open_connection("127.0.0.1", service.port, ssl=context, server_hostname=NAME)
        await until(lambda: opened(service, Phase.HEAD) == 1)
    for reader, writer in (stalled, open_too):
        await asyncio.wait_for(drained(reader), 30)
        writer.close()
    await until(lambda: asyncio.all_tasks() <= tasks)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", service.port)) != 0


async def test_what_no_longer_holds_breaks_off_in_the_middle(fleet: Credentials) -> None:
    """A seed that withdraws must not let a slow reader finish its addresses."""
    state = {f"layer.{number}": "x" * 1000 for number in range(20_000)}
    async with serving(manifest(state=state), credentials=fleet) as service:
        context = fleet.client_context()
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port, ssl=context, server_hostname=NAME)
        writer.write(
            f"GET {messages.SEED_MANIFEST}?seed_key={KEY} HTTP/1.1\r\nHost: s\r\n"
            f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
        )
        head = await reader.readuntil(b"\r\n\r\n")
        nbytes = int(head.lower().split(b"content-length: ")[1].split()[0])
        service.suspend("the weights are about to change")
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while chunk := await asyncio.wait_for(reader.read(1 << 16), 30):
                nbytes -= len(chunk)
        assert nbytes > 0
        writer.close()


# --- worker and planner ----------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def planner(authority: Authority, *, clients: Authority | None = None) -> AsyncIterator[PlannerProcess]:
    cert, key = authority.issue("planner")
    settings = settings_from(
        {
            "host": "localhost",
            "port": 0,
            "tls_cert": cert,
            "tls_key": key,
            **({} if clients is None else {"tls_client_ca": clients.file}),
        }
    )
    async with PlannerProcess(settings, tokens=Tokens(None, {"RFORK_TOKEN": TOKEN})).running() as process:
        yield process


async def test_a_planner_that_asks_for_certificates_takes_the_workers(authority: Authority, fleet: Credentials) -> None:
    async with planner(authority, clients=authority) as process:
        client = PlannerClient(process.url, credentials=fleet)
        await client.announce(KEY, SEED, fingerprint="f1", labels="host=a", slots=2)
        lease = await client.acquire(KEY, fingerprint="f1")
        assert lease.seed == SEED
        await client.release(lease)
        (entry,) = (await client.snapshot())["seeds"]
        assert entry["slots"] == 2


async def test_what_is_wrong_with_the_planners_tls_is_told_with_what_to_set(
    authority: Authority, stranger: Authority, worker: tuple[Path, Path]
) -> None:
    async with planner(authority) as process:
        by_address = process.url.replace("localhost", "127.0.0.1")
        for url, credentials, wanted in (
            (process.url, own(token=TOKEN), "rfork_tls_ca_file"),  # the system's CAs did not sign it
            (process.url, own(token=TOKEN, ca_file=stranger.file), "rfork_tls_ca_file"),
            (by_address, own(token=TOKEN, ca_file=authority.file), "rfork_scheduler_url"),
            (process.url.replace("https", "http"), own(token=TOKEN), "https"),
        ):
            with pytest.raises(PlannerError, match=wanted) as caught:
                await PlannerClient(url, credentials=credentials).announce(KEY, SEED)
            assert TOKEN not in str(caught.value)
            assert "object at" not in str(caught.value)
    with pytest.raises(PlannerError, match=r"Cannot connect to host localhost:\d+ \[") as caught:
        await PlannerClient(process.url, credentials=own(ca_file=authority.file)).announce(KEY, SEED)
    async with planner(authority, clients=authority) as process:
        bare = own(token=TOKEN, ca_file=authority.file)
        with pytest.raises(PlannerError, match="rfork_tls_cert_file"):
            await PlannerClient(process.url, credentials=bare).announce(KEY, SEED)
    async with planner(authority, clients=stranger) as process:
        ours = own(worker, token=TOKEN, ca_file=authority.file)
        with pytest.raises(PlannerError):
            await PlannerClient(process.url, credentials=ours).announce(KEY, SEED)


async def test_wrong_tls_is_not_asked_again_by_a_receiver_that_may_wait(authority: Authority) -> None:
    """Waiting is for a planner that is away; this one is there, and the answer will not change."""
    pauses: list[float] = []

    async def pause(delay_s: float) -> None:
        pauses.append(delay_s)

    async with planner(authority) as process:
        client = PlannerClient(process.url, credentials=own(token=TOKEN), sleep=pause)
        with pytest.raises(PlannerError, match="rfork_tls_ca_file"):
            await client.acquire(KEY, wait_s=60)
    assert pauses == []


@pytest.mark.parametrize(
    ("verify_code", "words"),
    [
        (20, "rfork_tls_ca_file"),
        (7, "rfork_tls_ca_file"),  # a CA of the same name with another key
        (62, "rfork_seed_tls_name"),
        (64, "rfork_seed_tls_name"),
        (10, "renew"),
        (26, "replace the seed's certificate"),  # made for clients alone
        (92, "replace the seed's certificate"),  # a CA without key usage, which Python 3.13 does not take
    ],
)
def test_advice_fits_what_openssl_found(verify_code: int, words: str) -> None:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = verify_code
    assert words in advice(error, tls=True, shows_certificate=True, service="seed")
