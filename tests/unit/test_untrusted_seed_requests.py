"""Whatever a caller sends to a seed: its service answers with what it promises, and the worker's log stays quiet."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.unit.test_seed_service import KEY, manifest
from vllm_rfork import messages
from vllm_rfork.seed_service import SeedService

PATHS = [
    messages.SEED_HEALTH,
    messages.SEED_INFO,
    messages.SEED_SHAPE_INFO,
    messages.SEED_MANIFEST,
    messages.SEED_EPOCH,
    messages.SEED_FACTS,
    messages.SEED_FETCH,
    "/",
    "//",
    "*",
    "/a%0Ab%1B[2J",
    "/%ff%fe",
    "/%",
    "http://[::1",
    "http://h:99999/rfork_epoch",
    "/../../etc/passwd",
]
QUERIES = st.sampled_from(
    [
        f"seed_key={KEY}",
        f"seed_key={KEY}&version=1",
        f"seed_key={KEY}&version=0",
        f"seed_key={KEY}&version=%D9%A3",
        f"seed_key={KEY}&version={'9' * 4000}",
        f"seed_key={KEY}&version=1&version=x",
        "seed_key=%ff%00%0a",
        "seed_key=%ED%B2%80",
        "seed_key=" + "x" * 4000,
        "seed_key",
        "&" * 2000,
        "=;%",
        "",
    ]
)
OURS = ["Authorization", "RFORK-FINGERPRINT", "Accept-Encoding"]
HTTPS = ["Content-Length", "Transfer-Encoding", "Expect", "Host", "Connection", "Upgrade", "Content-Type", "Range"]
NAMES = st.sampled_from([*OURS, *HTTPS, "X-Other"])
WORDS = ["Bearer x", "bearer \udcff", "UTF-8''%ff", "UTF-8''%0A", "\udcff", "\x1b[2J", "x" * 3000, ""]
MEANT = [
    "0",
    "-1",
    "5",
    "9" * 30,
    "chunked",
    "identity",
    "100-continue",
    "close",
    "keep-alive",
    "websocket",
    "bytes=0-",
]
VALUES = st.sampled_from([*WORDS, *MEANT]) | st.text(
    st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20
)
METHODS = st.sampled_from(["GET", "HEAD", "POST", "PUT", "OPTIONS", "CONNECT", "G\x1bT", ""])
ALLOWED = {200, 400, 401, 404, 405, 406, 409, 411, 413, 414, 417, 431, 501, 505}


class Served:
    """A seed service on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._service = SeedService(manifest(), bind_host="127.0.0.1", facts={"a": "b"})
        self.port = asyncio.run_coroutine_threadsafe(self._service.start(), self._loop).result(20)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._service.stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def send(self, request: bytes, timeout_s: float = 10.0) -> bytes:
        """The answer to ``request``; empty if there is none in time, or the connection is closed."""
        answer = bytearray()
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as connection,
            contextlib.suppress(ConnectionError, TimeoutError),
        ):
            connection.sendall(request)
            while part := connection.recv(65536):
                answer += part
        return bytes(answer)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.stop()


def check(served: Served, answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    if answer:
        assert int(answer.split(None, 2)[1]) in ALLOWED, answer[:300]
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not loud, loud[0].getMessage()
    good = served.send(f"GET {messages.SEED_HEALTH}?seed_key={KEY} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
    assert good.startswith(b"HTTP/1.1 200")


FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZED
@given(METHODS, st.sampled_from(PATHS), QUERIES, st.lists(st.tuples(NAMES, VALUES), max_size=4), st.binary(max_size=20))
@example("GET", messages.SEED_MANIFEST, f"seed_key={KEY}", [("RFORK-FINGERPRINT", "\udcff")], b"")
@example("GET", messages.SEED_EPOCH, f"seed_key={KEY}", [("Authorization", "Bearer \udcff")], b"")
def test_any_request_gets_an_answer_that_is_promised(
    served: Served,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    query: str,
    headers: list[tuple[str, str]],
    body: bytes,
) -> None:
    caplog.clear()
    lines = [f"{method} {path}?{query} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    request = "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body
    check(served, served.send(request, 0.3), caplog)  # the service waits for more of some


@FUZZED
@given(st.binary(max_size=400), st.sampled_from([b"", b"GET /rfork_epoch?seed_key=", b"GET / HTTP/1.1\r\n"]))
@example(b"\x16\x03\x01\x02\x00\x01\x00", b"")
def test_any_bytes_get_an_answer_that_is_promised(
    served: Served, caplog: pytest.LogCaptureFixture, noise: bytes, begin: bytes
) -> None:
    caplog.clear()
    check(served, served.send(begin + noise + b"\r\n\r\n", 0.3), caplog)
