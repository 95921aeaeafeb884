"""Whatever planners and seeds answer: their clients return what they promise, or raise an error of the package."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from vllm_rfork import messages
from vllm_rfork.clients import Outcome, PlannerClient, SeedClient
from vllm_rfork.errors import PlannerError, RForkError, SeedError
from vllm_rfork.messages import Lease, SeedAddress, Waiting
from vllm_rfork.net.client import Answer

SEED = SeedAddress("10.0.0.1", 1234, 0)
LEASE = Lease(SEED, "lease", 60.0)
KEY = "key"

#: What aiohttp lets through: no line breaks, but control characters and bytes that are not UTF-8.
TEXT = st.text(st.characters(exclude_characters="\r\n\0"), max_size=60)
GOOD_NUMBERS = ["0", "1", "1.5", "65535", "65536", "86400", "86401", "9" * 20]
BAD_NUMBERS = ["-1", "+1", "1_0", "1e3", "5e-324", "1e999", "nan", "inf", "-inf", "0x10", "１", "٣", ".5", "-0"]
NUMBERS = st.sampled_from([*GOOD_NUMBERS, *BAD_NUMBERS])
LONG = [";" * 4000, "," * 4000, "x" * 8000]
ODD = ["", " ", "\x1b[2J", "\udc80", "UTF-8''%ff", "UTF-8''%0A%0Dx", "a,b,c;;;"]
ADDRESSES = ["127.0.0.1", "::1", "[::1]", "::ffff:1.2.3.4", "own%junk", "a..b", "10.0.0.1:1:0", ":::"]
WORDS = ["position=1;bound=5", "position=0;bound=1e9;reason=\x1b", "f;3;10.0.0.1:1:0, g;x;y", "granted", "busy"]
HOSTILE = st.sampled_from([*LONG, *ODD, *ADDRESSES, *WORDS])
VALUES = TEXT | NUMBERS | HOSTILE
NAMES = sorted(
    {value for name, value in vars(messages).items() if name.isupper() and isinstance(value, str) and value.isascii()}
    & {value for value in vars(messages).values() if isinstance(value, str) and not value.startswith("/")}
    | {"Retry-After", "Content-Type"}
)
STATUSES = st.sampled_from([100, 200, 204, 301, 400, 401, 403, 404, 405, 409, 429, 500, 503, 599])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["epoch", "status"]) | TEXT, inner),
    max_leaves=8,
)
BODIES = st.binary(max_size=60) | JSON.map(lambda tree: json.dumps(tree).encode("utf-8", "surrogatepass"))
HEADERS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8)
GOOD_LEASE = {"SEED_IP": "10.0.0.1", "SEED_PORT": "1", "SEED_RANK": "0", "USER_ID": "u", "LEASE_TTL_SEC": "60"}


class Stranger:
    """Answers every exchange with the same."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.answer = Answer(status, CIMultiDictProxy(CIMultiDict(headers)), body, "http://planner")

    async def exchange(self, method: str, url: str, *, timeout_s: float, **arguments: Any) -> Answer:
        return self.answer


def planner(stranger: Stranger) -> PlannerClient:
    seconds = itertools.count(1.0)

    async def no_pause(_: float) -> None:
        pass

    client = PlannerClient("http://planner", request_timeout_s=30.0, sleep=no_pause, clock=lambda: next(seconds))
    client._http = stranger  # type: ignore[assignment]
    return client


def seeds(stranger: Stranger) -> SeedClient:
    client = SeedClient(request_timeout_s=5.0)
    client._http._http = stranger  # type: ignore[assignment]
    return client


def ends(call: Awaitable[Any], error: type[RForkError], *promised: type) -> None:
    """``call`` returns one of the ``promised`` types, or raises ``error`` with a text that can be logged."""

    async def run() -> Any:
        return await call

    try:
        returned = asyncio.run(run())
    except RForkError as raised:
        check(raised, error)
        return
    assert isinstance(returned, promised), returned


def check(raised: RForkError, error: type[RForkError]) -> None:
    assert isinstance(raised, error) or type(raised).__name__ == "NoSeedAvailable"
    assert str(raised).isprintable()
    assert len(str(raised)) < 9000


SEED_CALLS: dict[str, tuple[Callable[[SeedClient], Awaitable[Any]], type]] = {
    "manifest": (lambda client: client.manifest(SEED, KEY, "f"), object),
    "epoch": (lambda client: client.confirm_epoch(SEED, KEY, "e"), type(None)),
    "healthy": (lambda client: client.healthy(SEED, KEY), bool),
    "facts": (lambda client: client.facts(SEED, KEY), dict),
}


@pytest.mark.parametrize("call", SEED_CALLS)
@settings(max_examples=150, deadline=None)
@given(STATUSES, HEADERS, BODIES)
@example(200, {}, b"[" * 100_000)
@example(200, {}, b'{"epoch":' * 100_000)
@example(200, {}, json.dumps({"epoch": "e\x1b[2J\n" * 5000}).encode())
@example(200, {}, b'{"epoch":"\\ud800"}')
@example(200, {}, b'{"\\ud800":"\\udfff"}')
@example(409, {messages.FINGERPRINT: "UTF-8''%ff"}, b"\xff\x1b" * 2000)
def test_no_answer_of_a_seed_raises_anything_else(call: str, status: int, headers: dict[str, str], body: bytes) -> None:
    make, promised = SEED_CALLS[call]
    ends(make(seeds(Stranger(status, headers, body))), SeedError, promised)


PLANNER_CALLS: dict[str, tuple[Callable[[PlannerClient], Awaitable[Any]], tuple[type, ...]]] = {
    "acquire": (lambda client: client.acquire(KEY, wait_s=3.0), (Lease,)),
    "ask": (lambda client: client.ask(KEY, "ticket", in_queue=True), (Lease, Waiting)),
    "renew": (lambda client: client.renew(LEASE), (Outcome,)),
    "renews": (lambda client: client.renews_leases(), (bool,)),
    "release": (lambda client: client.release(LEASE, result="failed", cause="x"), (Outcome,)),
    "announce": (lambda client: client.announce(KEY, SEED), (object,)),
    "withdraw": (lambda client: client.withdraw(KEY, SEED), (Outcome,)),
    "intend": (lambda client: client.intend(KEY, "i", ttl_s=1.0), (Outcome,)),
    "healthz": (lambda client: client.healthz(), (dict,)),
    "snapshot": (lambda client: client.snapshot(), (dict,)),
}


@pytest.mark.parametrize("call", PLANNER_CALLS)
@settings(max_examples=150, deadline=None)
@given(STATUSES, st.booleans(), HEADERS, BODIES)
@example(404, False, {messages.OTHER_FINGERPRINTS: ";" * 8000}, b"")
@example(404, False, {messages.OTHER_FINGERPRINTS: "f;9999999999;10.0.0.1:1:0" + ", " * 3000}, b"")
@example(404, False, {messages.WAITING: "position=1;bound=" + "9" * 5000}, b"")
@example(404, False, {messages.WAITING: "position=" + "9" * 7000}, b"")
@example(200, True, {"USER_ID": "UTF-8''%ff"}, b"")
@example(200, True, {"SEED_IP": "\udcff"}, b"")
@example(200, True, {"LEASE_TTL_SEC": "nan"}, b"")
@example(503, False, {"Retry-After": "٣"}, b"")
@example(200, False, {messages.STATE: "UTF-8''%ED%B2%80"}, b"")
def test_no_answer_of_a_planner_raises_anything_else(
    call: str, status: int, lease: bool, headers: dict[str, str], body: bytes
) -> None:
    make, promised = PLANNER_CALLS[call]
    client = planner(Stranger(status, {**(GOOD_LEASE if lease else {}), **headers}, body))
    ends(make(client), PlannerError, *promised)
    ends(make(client), PlannerError, *promised)  # with what it has kept of the first answer


@given(HEADERS)
def test_a_lease_from_any_answer_can_be_sent_back(headers: dict[str, str]) -> None:
    """A planner's values are sent back to it in headers: without a line break, and with the same meaning."""
    try:
        lease = messages.lease_from_answer(CIMultiDict({**GOOD_LEASE, **headers}))
    except messages.BadMessage:
        return
    sent = lease.headers()
    assert not any({"\r", "\n"} & set(value) for value in sent.values())
    again = messages.lease_from_answer(CIMultiDict({**sent, "LEASE_TTL_SEC": "60"}))
    assert (again.seed, again.user_id) == (lease.seed, lease.user_id)
    assert lease.ttl_s is None or 0 < lease.ttl_s <= 86400
