"""The seed's HTTP service, over real sockets: who gets an answer, which, until when, and at whose cost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.sockets import read_all
from vllm_rfork import messages
from vllm_rfork.clients import SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest
from vllm_rfork.manifest.schema import Manifest, Region, Span, TensorEntry
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.advertise import listen_host
from vllm_rfork.net.connection import Phase
from vllm_rfork.net.credentials import Credentials, Options
from vllm_rfork.net.server import Bounds
from vllm_rfork.seed_service import SeedService

KEY = "/models/q$prod$kv_both$0$0"
TOKEN = "s3cret-token"


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "seed_key": KEY,
        "fingerprint": "f1",
        "epoch": "epoch-1",
        "layout": "runtime",
        "engine": "yuanrong",
        "endpoint": "10.0.0.1:7000",
        "regions": (Region(4096, 4096),),
        "spans": (Span(0, 4096, 12),),
        "tensors": (TensorEntry("w", "bfloat16", (2, 3), (3, 1), 0),),
        **changes,
    }
    return Manifest(**fields)


@contextlib.asynccontextmanager
async def serving(served: Manifest | None = None, *, token: str = "", **options: Any) -> AsyncIterator[SeedService]:
    options = {
        "bind_host": "127.0.0.1",
        "ready_timeout_s": 10.0,
        "credentials": Credentials(Options(token=token)),
        **options,
    }
    service = SeedService(served or manifest(), **options)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def get(
    service: SeedService, path: str, *, key: str | None = KEY, headers: dict[str, str] | None = None, **params: str
) -> tuple[int, str]:
    query = params if key is None else {"seed_key": key, **params}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        url = f"http://127.0.0.1:{service.port}{path}"
        async with session.get(url, params=query, headers=headers) as response:
            return response.status, await response.text()


async def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    deadline = asyncio.get_running_loop().time() + within_s
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "the condition never came true"
        await asyncio.sleep(0.01)


# --- the installed base's calls --------------------------------------------------------------------------------------


async def test_health_says_whose_seed_it_is() -> None:
    async with serving() as service:
        assert (await get(service, messages.SEED_HEALTH))[0] == 200
        assert (await get(service, messages.SEED_HEALTH, key=KEY + "1"))[0] == 400
        assert (await get(service, messages.SEED_HEALTH, key=None))[0] == 400


@pytest.mark.parametrize("key", [KEY, "another"])
async def test_legacy_receivers_are_told_that_there_is_nothing_for_them(key: str) -> None:
    async with serving() as service:
        for path, name in (
            (messages.SEED_INFO, "rfork_transfer_engine_info"),
            (messages.SEED_SHAPE_INFO, "rfork_transfer_engine_shape_info"),
        ):
            assert await get(service, path, key=key) == (200, f'{{"{name}":null}}')
            assert (await get(service, path, key=None))[0] == 400


async def test_fetch_seed_answers_ok_without_a_key() -> None:
    async with serving() as service:
        assert await get(service, messages.SEED_FETCH, key=None) == (200, '{"status":"ok"}')


@pytest.mark.parametrize("key", ["模型$生产 環境", "a+b c&d=e#f?g/h%20", "ключ" * 500, 'quote"$back\\slash'])
async def test_any_key_survives_the_query_string(key: str) -> None:
    async with serving(manifest(seed_key=key)) as service:
        assert (await get(service, messages.SEED_HEALTH, key=key))[0] == 200
        assert (await get(service, messages.SEED_HEALTH, key=key + "x"))[0] == 400


async def test_two_keys_in_one_request_are_refused() -> None:
    async with serving() as service, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{service.port}{messages.SEED_HEALTH}"
        async with session.get(url, params=[("seed_key", KEY), ("seed_key", "other")]) as response:
            assert response.status == 400


# --- ours ------------------------------------------------------------------------------------------------------------


async def test_the_client_gets_the_manifest_it_was_given() -> None:
    async with serving() as service:
        client, seed = SeedClient(), SeedAddress("127.0.0.1", service.port, 0)
        assert await client.manifest(seed, KEY, "f1") == manifest()
        await client.confirm_epoch(seed, KEY, "epoch-1")
        with pytest.raises(SeedError, match="epoch"):
            await client.confirm_epoch(seed, KEY, "epoch-0")


async def test_a_receiver_of_another_fingerprint_is_refused_before_it_has_an_address() -> None:
    async with serving() as service:
        status, text = await get(service, messages.SEED_MANIFEST, headers={"RFORK-FINGERPRINT": "f2"})
        assert status == 409
        assert "fingerprint" in text
        assert "4096" not in text


async def test_a_receiver_of_another_key_gets_neither_manifest_nor_epoch() -> None:
    async with serving() as service:
        for path in (messages.SEED_MANIFEST, messages.SEED_EPOCH):
            status, text = await get(service, path, key="another")
            assert status == 400
            assert "epoch-1" not in text


async def test_a_reader_gets_the_newest_manifest_version_that_it_reads() -> None:
    encoders = {1: encode_manifest, 2: lambda m: b'{"version":2}', 3: lambda m: b'{"version":3}'}
    async with serving(encoders=encoders) as service:
        for stated, version in [("1", 1), ("2", 2), ("3", 3), ("4", 3)]:
            status, text = await get(service, messages.SEED_MANIFEST, version=stated)
            assert (status, json.loads(text)["version"]) == (200, version)
        assert json.loads((await get(service, messages.SEED_MANIFEST))[1])["version"] == 1
    async with serving(encoders={2: lambda m: b"{}", 3: lambda m: b"{}"}) as service:
        status, text = await get(service, messages.SEED_MANIFEST, version="1")
        assert status == 406
        assert "[2, 3]" in text
    async with serving() as service:
        for version in ("one", "+1", "1_0", "１", "-0"):
            status, text = await get(service, messages.SEED_MANIFEST, version=version)
            assert (status, "parameter version" in text) == (400, True)


async def test_a_manifest_is_encoded_once_however_many_read_it() -> None:
    encoded = 0

    def encode(made: Manifest) -> bytes:
        nonlocal encoded
        encoded += 1
        return encode_manifest(made)

    async with serving(encoders={1: encode}) as service:
        texts = await asyncio.gather(*(get(service, messages.SEED_MANIFEST) for _ in range(10)))
        assert {status for status, _ in texts} == {200}
    assert encoded == 1


# --- a suspended seed ------------------------------------------------------------------------------------------------


async def test_a_suspended_seed_refuses_everything_at_once_and_the_next_has_another_epoch() -> None:
    async with serving() as service:
        seed = SeedAddress("127.0.0.1", service.port, 0)
        service.suspend("weights are being reloaded")
        assert (await get(service, messages.SEED_HEALTH))[0] == 400
        for path in (messages.SEED_MANIFEST, messages.SEED_EPOCH):
            status, text = await get(service, path)
            assert status == 409
            assert "weights are being reloaded" in text
        for path in (messages.SEED_INFO, messages.SEED_SHAPE_INFO):
            assert list(json.loads((await get(service, path))[1]).values()) == [None]
        with pytest.raises(SeedError, match="reloaded"):
            await SeedClient().confirm_epoch(seed, KEY, "epoch-1")

    async with serving(manifest(epoch="epoch-2"), port=service.port):
        assert (await SeedClient().manifest(seed, KEY, "f1")).epoch == "epoch-2"
        with pytest.raises(SeedError, match="epoch-2"):
            await SeedClient().confirm_epoch(seed, KEY, "epoch-1")


def padded(nbytes: int) -> Manifest:
    return manifest(state={"padding": "x" * nbytes})


@contextlib.asynccontextmanager
async def slow_reader(service: SeedService, request: bytes) -> AsyncIterator[socket.socket]:
    """A connection that has sent ``request`` and whose kernel takes next to nothing until it is read."""
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", service.port))
        await loop.sock_sendall(sock, request)
        yield sock


def request_for(path: str, *more: str, key: str = KEY) -> bytes:
    lines = [f"GET {path}?seed_key={key} HTTP/1.1", "Host: seed", *more, "", ""]
    return "\r\n".join(lines).encode()


async def test_a_manifest_that_is_being_sent_breaks_off_when_it_stops_being_true() -> None:
    big = padded(24 * 1024 * 1024)
    async with serving(big) as service:
        async with slow_reader(service, request_for(messages.SEED_MANIFEST)) as sock:
            head = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1024), 30)
            assert head.startswith(b"HTTP/1.1 200")
            service.suspend("sleep")
            received = head + await read_all(sock)
        assert len(received) < len(encode_manifest(big))
    async with serving(big) as service:
        async with slow_reader(service, request_for(messages.SEED_MANIFEST)) as sock:
            whole = await read_all(sock)
        assert decode_manifest(whole.partition(b"\r\n\r\n")[2]) == big


async def test_a_manifest_too_large_for_any_receiver_is_refused_before_it_is_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_rfork.seed_service.MAX_MANIFEST_NBYTES", 1000)
    with pytest.raises(SeedError, match="1000"):
        SeedService(padded(2000))


# --- start and stop --------------------------------------------------------------------------------------------------


async def test_a_taken_port_is_an_error_that_names_host_and_port_and_leaves_nothing_behind() -> None:
    async with serving() as first:
        before = open_sockets()
        second = SeedService(manifest(), bind_host="127.0.0.1", port=first.port)
        with pytest.raises(SeedError, match=rf"127\.0\.0\.1:{first.port}"):
            await second.start()
        await second.stop()
        await until(lambda: open_sockets() <= before)


async def test_a_taken_port_is_passed_over_for_the_next_of_the_range(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with serving() as first, serving() as second, serving() as free:
        await free.stop()
        async with serving(port=first.port, other_ports=(second.port, free.port)) as third:
            assert third.port == free.port
            assert await SeedClient().healthy(SeedAddress("127.0.0.1", third.port, 0), KEY)
            assert f"Port {first.port} is in use" in caplog.text
            assert [each.levelname for each in caplog.records if each.levelno >= logging.WARNING] == []


async def test_where_the_whole_range_is_taken_a_random_port_is_used_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        serving() as first,
        serving() as second,
        serving(port=first.port, other_ports=(second.port,)) as third,
    ):
        assert third.port not in {0, first.port, second.port}
        assert await SeedClient().healthy(SeedAddress("127.0.0.1", third.port, 0), KEY)
    (warning,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    for part in ("rfork_seed_port_base", str(first.port), str(second.port), str(third.port)):
        assert part in warning


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0), ("127.0.0.1", 70000)])
async def test_an_address_that_cannot_be_had_is_a_seed_error(host: str, port: int) -> None:
    with pytest.raises(SeedError, match=host):
        await SeedService(manifest(), bind_host=host, port=port).start()


async def test_a_start_ends_at_once_where_the_seed_is_withdrawn_meanwhile() -> None:
    """A worker's method that changes the weights waits for this start; the suspended service refuses itself as well."""
    service = SeedService(manifest(), bind_host="127.0.0.1", ready_timeout_s=600.0)
    service.suspend("weights are reloaded")
    with pytest.raises(SeedError, match="withdrawn before it was ready: weights are reloaded"):
        await asyncio.wait_for(service.start(), 60)


async def test_start_waits_until_the_service_answers_and_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def healthy(self: SeedClient, seed: SeedAddress, seed_key: str) -> bool:
        return False

    monkeypatch.setattr(SeedClient, "healthy", healthy)
    service = SeedService(manifest(), bind_host="127.0.0.1", ready_timeout_s=0.3)
    before = open_sockets()
    with pytest.raises(SeedError, match="rfork_seed_timeout_sec"):
        await service.start()
    await until(lambda: open_sockets() <= before)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", service.port), timeout=5).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost", "::1"])
async def test_start_finds_itself_wherever_it_listens(host: str) -> None:
    if host == "::1" and not ipv6_works():
        pytest.skip("this machine has no IPv6 loopback")
    async with serving(bind_host=host) as service:
        assert service.port > 0


async def test_an_announced_ipv6_address_is_listened_on_by_default_and_ipv4_stays() -> None:
    assert listen_host("0.0.0.0", "10.0.0.1") == "0.0.0.0"
    assert listen_host("0.0.0.0", "node-7") == "0.0.0.0"
    assert listen_host("10.0.0.1", "2001:db8::1") == "10.0.0.1", "what the user has set stays"
    assert listen_host("0.0.0.0", "2001:db8::1") == "::"
    if not ipv6_works():
        pytest.skip("this machine has no IPv6 loopback")
    async with serving(bind_host=listen_host("0.0.0.0", "::1"), advertised_host="::1") as service:
        for host in ("::1", "127.0.0.1"):
            assert await SeedClient().healthy(SeedAddress(host, service.port, 0), KEY)


async def test_an_announced_address_that_is_not_the_service_is_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(advertised_host="127.0.0.1") as service:
        await service.check_advertised()
    async with serving(bind_host="0.0.0.0", advertised_host="127.0.0.9") as service:
        await service.check_advertised()
    assert caplog.records == []
    async with serving(advertised_host="127.0.0.9") as service:  # it listens on 127.0.0.1 alone
        await service.check_advertised()
        (warning,) = [each.getMessage() for each in caplog.records]
        for part in ("127.0.0.9", str(service.port), "rfork_seed_advertise_host", "rfork_seed_bind_host"):
            assert part in warning
    caplog.clear()
    async with serving() as service:
        other = SeedService(manifest(seed_key="another"), bind_host="127.0.0.9", port=service.port)
        await other.start()
        service._advertised_host = "127.0.0.9"
        await service.check_advertised()
        await other.stop()
    assert "another service answers there" in caplog.text


def ipv6_works() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


async def test_stop_frees_the_port_drops_the_callers_and_may_be_repeated() -> None:
    before = open_sockets()
    async with serving(padded(8 * 1024 * 1024)) as service:
        port = service.port
        async with slow_reader(service, request_for(messages.SEED_MANIFEST)) as sock:
            await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1024), 30)
            await service.stop()
            await service.stop()
            await read_all(sock)  # ends
    async with serving(port=port) as again:
        assert again.port == port
    await until(lambda: open_sockets() <= before)


def open_sockets() -> int:
    gc.collect()
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    return found


async def test_a_forked_child_does_not_keep_the_port_open() -> None:
    async with serving() as service:
        pid = os.fork()
        if pid == 0:
            try:
                signal.pause()
            finally:
                os._exit(0)
        try:
            await service.stop()
            await until(lambda: not connects(service.port))
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    except (TimeoutError, ConnectionResetError):  # a listener whose queue is full, or that was just closed
        return True
    return True


# --- callers that misbehave ------------------------------------------------------------------------------------------


async def raw(service: SeedService, data: bytes) -> bytes:
    async with slow_reader(service, data) as sock:
        return await read_all(sock)


async def test_each_connection_carries_one_request() -> None:
    async with serving() as service:
        answer = await raw(service, request_for(messages.SEED_HEALTH) * 3)
        assert answer.count(b"HTTP/1.1") == 1
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("more", [("Content-Length: 5",), ("Transfer-Encoding: chunked",)])
async def test_a_request_body_is_refused(more: tuple[str, ...]) -> None:
    async with serving() as service:
        answer = await raw(service, request_for(messages.SEED_HEALTH, *more))
        assert answer.startswith(b"HTTP/1.1 413")


async def test_head_is_get_without_the_body() -> None:
    async with serving() as service:
        for path in (messages.SEED_FETCH, messages.SEED_MANIFEST):
            answer = await raw(service, request_for(path).replace(b"GET", b"HEAD", 1))
            head, _, body = answer.partition(b"\r\n\r\n")
            whole = await raw(service, request_for(path))
            assert head.startswith(b"HTTP/1.1 200")
            assert body == b""
            assert f"content-length: {len(whole.partition(bytes.fromhex('0d0a0d0a'))[2])}".encode() in head.lower()


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
async def test_only_get_is_answered(method: str) -> None:
    async with serving() as service:
        answer = await raw(service, request_for(messages.SEED_MANIFEST).replace(b"GET", method.encode(), 1))
        assert answer.startswith(b"HTTP/1.1 405")


@pytest.mark.parametrize(
    "request_",
    [
        request_for(messages.SEED_HEALTH, "X: " + "a" * 10_000),
        request_for(messages.SEED_HEALTH, key="k" * 40_000),
        request_for(messages.SEED_HEALTH, *[f"X{n}: 1" for n in range(500)]),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
        b"GET\r\n\r\n",
    ],
    ids=["long header", "long key", "many headers", "TLS hello", "no request line"],
)
async def test_an_oversized_or_malformed_head_is_refused_quietly(
    request_: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as service:
        caplog.clear()
        answer = await raw(service, request_)
        assert answer == b"" or (answer.startswith(b"HTTP/1.") and b" 400 " in answer.partition(b"\r\n")[0])
        assert (await get(service, messages.SEED_HEALTH))[0] == 200
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_endless_headers_cost_next_to_nothing() -> None:
    async with serving(bounds=Bounds(head_timeout_s=3600)) as service:
        async with slow_reader(service, b"GET / HTTP/1.1\r\n") as sock:
            endless = asyncio.get_running_loop().sock_sendall(sock, b"X: y\r\n" * 2_500_000)
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(endless, 30)
        assert (await get(service, messages.SEED_HEALTH))[0] == 200


async def test_a_caller_that_goes_on_sending_is_cut_off() -> None:
    big = padded(24 * 1024 * 1024)
    async with serving(big, bounds=Bounds(head_timeout_s=3600, answer_timeout_s=3600)) as service:
        more = request_for(messages.SEED_HEALTH) * 200_000
        for begun, rest in ((b"GET /", b"a" * len(more)), (request_for(messages.SEED_MANIFEST), more)):
            async with slow_reader(service, begun) as sock:
                endless = asyncio.get_running_loop().sock_sendall(sock, rest)
                with pytest.raises(ConnectionError):
                    await asyncio.wait_for(endless, 30)


async def test_an_answer_may_take_longer_than_a_request() -> None:
    big = padded(24 * 1024 * 1024)
    request_ = request_for(messages.SEED_MANIFEST)
    async with (
        serving(big, bounds=Bounds(head_timeout_s=1.0)) as service,
        slow_reader(service, request_) as sock,
    ):
        begun_at = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > begun_at + 1.5)
        assert decode_manifest((await read_all(sock)).partition(b"\r\n\r\n")[2]) == big


@pytest.mark.parametrize("begun", [b"", b"GET /health_check_with_key?seed_key=k HTTP/1.1\r\nHost: "])
async def test_a_caller_that_never_finishes_its_request_is_dropped(begun: bytes) -> None:
    async with serving(bounds=Bounds(head_timeout_s=0.1)) as service:
        assert await raw(service, begun) == b""


async def test_a_caller_that_never_reads_is_dropped_and_costs_little_memory_meanwhile() -> None:
    big = padded(24 * 1024 * 1024)
    async with serving(big, bounds=Bounds(answer_timeout_s=2.0)) as service:
        before = resident_nbytes()
        async with contextlib.AsyncExitStack() as stack:
            socks = [
                await stack.enter_async_context(slow_reader(service, request_for(messages.SEED_MANIFEST)))
                for _ in range(16)
            ]
            for sock in socks:
                assert (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1024), 30)).startswith(
                    b"HTTP"
                )
            assert resident_nbytes() - before < 16 * 8 * 1024 * 1024
            await until(lambda: opened(service) == 0)
            for sock in socks:
                assert len(await read_all(sock)) < 24 * 1024 * 1024


async def begun(sock: socket.socket) -> None:
    """Return once an answer begins to arrive."""
    head = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1024), 30)
    assert head.startswith(b"HTTP/1.1 200")


def opened(service: SeedService, *phases: Phase) -> int:
    connections = service._server.connections
    assert connections is not None
    return connections.count(*(phases or tuple(Phase)))


def resident_nbytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_idle_connections_do_not_keep_callers_out() -> None:
    """65 of them used to: 64 were counted before a request arrived."""
    async with serving(bounds=Bounds(head_timeout_s=3600)) as service, contextlib.AsyncExitStack() as stack:
        for number in range(1, 301):
            await stack.enter_async_context(slow_reader(service, b"" if number % 2 else b"GET /"))
            if number in (65, 300):
                assert (await get(service, messages.SEED_HEALTH))[0] == 200
        assert opened(service) <= 256


async def test_more_requests_at_once_than_allowed_are_sent_away() -> None:
    big = padded(24 * 1024 * 1024)
    async with serving(big, bounds=Bounds(max_connections=2, answer_timeout_s=3600)) as service:
        async with contextlib.AsyncExitStack() as stack:
            socks = [
                await stack.enter_async_context(slow_reader(service, request_for(messages.SEED_MANIFEST)))
                for _ in range(2)
            ]
            for sock in socks:
                assert (await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1024), 30)).startswith(
                    b"HTTP"
                )
            assert (await get(service, messages.SEED_HEALTH))[0] == 503
        await until(lambda: opened(service) == 0)
        assert (await get(service, messages.SEED_HEALTH))[0] == 200


# --- who may ask -----------------------------------------------------------------------------------------------------


async def test_with_a_token_nothing_is_told_without_it() -> None:
    async with serving(token=TOKEN) as service:
        paths = [
            messages.SEED_HEALTH,
            messages.SEED_INFO,
            messages.SEED_SHAPE_INFO,
            messages.SEED_FETCH,
            messages.SEED_MANIFEST,
            messages.SEED_EPOCH,
            messages.METRICS,
            "/anything",
        ]
        for path in paths:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
                assert (await get(service, path, headers=headers))[0] == 401
        assert (await get(service, messages.SEED_HEALTH, headers={"Authorization": f"Bearer {TOKEN}"}))[0] == 200
        client = SeedClient(token=TOKEN)
        assert await client.manifest(SeedAddress("127.0.0.1", service.port, 0), KEY, "f1") == manifest()


async def test_facts_are_told_to_whoever_may_have_the_manifest() -> None:
    """By key and token, and also while the seed is suspended: they are the worker's, not the epoch's."""
    facts = {"options.model.dtype": "bfloat16", "torch": "2.9"}
    credentials = Credentials(Options(token=TOKEN))
    service = SeedService(manifest(), bind_host="127.0.0.1", credentials=credentials, facts=facts)
    address = SeedAddress("127.0.0.1", await service.start(), 0)
    try:
        client = SeedClient(token=TOKEN)
        assert await client.facts(address, KEY) == facts
        service.suspend("asleep")
        assert await client.facts(address, KEY) == facts
        with pytest.raises(SeedError, match="400"):
            await client.facts(address, "another key")
        with pytest.raises(SeedError, match="401"):
            await SeedClient().facts(address, KEY)
    finally:
        await service.stop()


async def test_the_workers_metrics_need_no_key_and_are_there_while_the_seed_is_suspended() -> None:
    async with serving(token=TOKEN) as service:
        service.suspend("asleep")
        url = f"http://127.0.0.1:{service.port}{messages.METRICS}"
        authorization = {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession() as session, session.get(url, headers=authorization) as answer:
            page = await answer.text()
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# TYPE rfork_loads_total counter" in page
    assert KEY not in page


async def test_neither_logs_nor_answers_hold_the_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(token=TOKEN) as service:
        for headers in ({"Authorization": f"Bearer {TOKEN}"}, {"Authorization": f"Bearer {TOKEN}x"}):
            for path in (messages.SEED_HEALTH, messages.SEED_MANIFEST):
                assert TOKEN not in (await get(service, path, headers=headers))[1]
        await raw(service, request_for(messages.SEED_HEALTH, f"Authorization: Bearer {TOKEN}", "bad header"))
    assert TOKEN not in caplog.text


def test_encoders_in_use_write_what_the_decoder_reads() -> None:
    from vllm_rfork.seed_service import ENCODERS

    for version, encode in ENCODERS.items():
        assert decode_manifest(encode(manifest())).version == version
    assert msgspec.json.decode(encode_manifest(manifest()))["epoch"] == "epoch-1"
