"""Damaged or invented NIXL metadata is refused before NIXL reads it: NIXL would end the process."""

from __future__ import annotations

import ctypes
import json
import random
import struct
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.nixl.engine import NixlEngine
from vllm_rfork.engines.nixl.metadata import check_metadata
from vllm_rfork.engines.nixl.peer import IDENTITY_NBYTES, Endpoint, decode_endpoint, encode_endpoint
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region


def field(tag: bytes, value: bytes) -> bytes:
    return tag + struct.pack("<Q", len(value)) + value + b"|"


def number(tag: bytes, value: int) -> bytes:
    return field(tag, struct.pack("<Q", value))


def registration(address: int, nbytes: int, device: int = 0, key: bytes = b"\x00" * 11) -> bytes:
    return field(b"", struct.pack("<QQQ", address, nbytes, device) + key)


IDENTITY_AT = 0x7000_0000_1000
REGISTRATIONS = registration(0x1000, 64) + registration(IDENTITY_AT, 1040)


def section(entries: bytes = REGISTRATIONS, count: int = 2, kind: int = 0) -> bytes:
    return (
        field(b"bknd", b"UCX")
        + field(b"nixlDList", b"nixlSDList")
        + field(b"t", struct.pack("<I", kind))
        + number(b"n", count)
        + entries
    )


def metadata(
    *sections: bytes, agent: bytes = b"rfork-0", backends: int = 1, begins: bytes = b"\x20", count: int | None = None
) -> bytes:
    sections = sections or (section(),)
    connections = (field(b"t", b"UCX") + field(b"c", begins + bytes(212))) * backends
    return b"".join(
        (
            b"nixlSerDes|",
            field(b"Agent", agent),
            number(b"Conns", backends),
            connections,
            field(b"", b"MemSection"),
            number(b"nixlSecElms", len(sections) if count is None else count),
            *sections,
        )
    )


GOOD = metadata()


def check(blob: bytes) -> None:
    check_metadata(blob, IDENTITY_AT, IDENTITY_NBYTES)


def refused(blob: bytes) -> bool:
    try:
        check(blob)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(
    "blob",
    [
        GOOD,
        metadata(section(kind=1, entries=registration(1 << 40, 5), count=1), section()),
        metadata(section(), backends=2),
    ],
    ids=["memory", "memory of two kinds", "two backends"],
)
def test_what_nixl_writes_is_accepted(blob: bytes) -> None:
    check(blob)


@pytest.mark.parametrize(
    ("blob", "why"),
    [
        (b"", "does not begin"),
        (GOOD + b"|", "1 bytes follow"),
        (metadata(agent=b"rfork-\xff"), "name"),
        (metadata(agent=b""), "name"),
        (metadata(agent=b"a b"), "name"),
        (metadata(backends=5), "Conns is 5"),
        (metadata(begins=b"\x9b"), "address is not UCX's"),
        (metadata(begins=b"\x24"), "address is not UCX's"),
        (metadata(count=2), "no 'bknd'"),
        (metadata(count=1 << 60), "nixlSecElms is"),
        (metadata(section(kind=2)), "kind of memory"),
        (metadata(section(kind=1 << 31)), "kind of memory"),
        (metadata(section(count=3)), "no ''|no 'bknd'|does not end|has"),
        (metadata(section(count=1)), "bytes follow|no 'bknd'"),
        (metadata(section(count=1 << 62)), "n is"),
        (metadata(section(registration(IDENTITY_AT, 1040, device=1024), 1)), "address is impossible"),
        (metadata(section(registration(0, 1040), 1)), "address is impossible"),
        (metadata(section(registration(IDENTITY_AT, 0), 1)), "address is impossible"),
        (metadata(section(registration(IDENTITY_AT, (1 << 64) - 1), 1)), "address is impossible"),
        (metadata(section(registration(IDENTITY_AT, 1040, key=b""), 1)), "key is not UCX"),
        (metadata(section(registration(IDENTITY_AT, 1040, key=bytes(8)), 1)), "key is not UCX"),
        (metadata(section(registration(IDENTITY_AT, 1040, key=bytes(8) + b"\x36" + bytes(2)), 1)), "key is not UCX"),
        (metadata(section(registration(IDENTITY_AT, 1040, key=b"\1" + bytes(8)), 1)), "key is not UCX"),
        (metadata(section(registration(IDENTITY_AT, 1040, key=b"\1" + bytes(8) + b"\2\0"), 1)), "key is not UCX"),
        (metadata(section(registration(IDENTITY_AT, 1040, key=b"\xff" + bytes(10)), 1)), "key is not UCX"),
        (metadata(section(registration(IDENTITY_AT, 8), 1)), "identifies the engine"),
        (metadata(section(registration(IDENTITY_AT, 1040, key=b"k" * 20_000), 1)), "may have"),
    ],
)
def test_what_nixl_does_not_write_is_refused(blob: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check(blob)


def test_every_cut_and_every_byte_too_many_is_refused() -> None:
    for at in range(len(GOOD)):
        assert refused(GOOD[:at])
    for at in (0, 5, 11, 20, 60, len(GOOD) - 3):
        assert refused(GOOD[:at] + b"\x00" + GOOD[at:])


@given(st.binary(max_size=300), st.integers(0, len(GOOD)), st.integers(0, 40))
def test_any_bytes_are_metadata_or_a_value_error(noise: bytes, at: int, cut: int) -> None:
    for blob in (noise, b"nixlSerDes|" + noise, GOOD[:at] + noise + GOOD[at + cut :]):
        assert refused(blob) in {True, False}  # nothing else is raised


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    """Of an engine in this process that has two regions registered."""
    memory = ctypes.create_string_buffer(1 << 16)
    engine = NixlEngine()
    engine.open(EngineConfig(device="cpu", timeout_s=20.0))
    at = ctypes.addressof(memory)
    engine.register([Region(at, 4096), Region(at + 8192, 1000)])
    yield decode_endpoint(engine.endpoint)
    engine.close()


def test_metadata_of_the_installed_nixl_is_accepted_with_and_without_a_checksum(endpoint: Endpoint) -> None:
    assert len(endpoint.checksum) == 32
    older = {name: value for name, value in msgspec.to_builtins(endpoint).items() if name != "checksum"}
    assert msgspec.structs.replace(decode_endpoint(json.dumps(older)), checksum=endpoint.checksum) == endpoint


def test_an_endpoint_that_was_damaged_is_refused_and_another_seed_may_do(endpoint: Endpoint) -> None:
    """Wherever it was damaged: UCX's own part, which nothing here can parse, is most of it."""
    rng = random.Random(7)
    for _ in range(500):
        blob = bytearray(endpoint.metadata)
        for at in rng.sample(range(len(blob)), 2):
            blob[at] ^= rng.randrange(1, 256)
        text = msgspec.json.encode(msgspec.structs.replace(endpoint, metadata=bytes(blob))).decode()
        with pytest.raises(EngineError, match="damaged: its checksum differs") as caught:
            decode_endpoint(text)
        assert caught.value.retry_elsewhere
    for change in (
        {"pid": endpoint.pid + 1},
        {"identity_at": endpoint.identity_at + 16},
        {"boot": "x"},
        {"rdma": True},
    ):
        text = msgspec.json.encode(msgspec.structs.replace(endpoint, **change)).decode()
        with pytest.raises(EngineError, match="checksum differs"):
            decode_endpoint(text)


#: Connects to endpoints in which the agent's name and kind of memory, or UCX's address, are changed: of such, NIXL's
#: reader dies soon. Each agent has a name of its own, or NIXL would compare the address and not read it.
_TRY = """
import random, sys
import msgspec
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.nixl.engine import NixlEngine
from vllm_rfork.engines.nixl.peer import Endpoint, encode_endpoint
from vllm_rfork.errors import EngineError

endpoint = msgspec.json.decode(sys.stdin.read(), type=Endpoint)
name, kind = endpoint.metadata.index(b"rfork-"), endpoint.metadata.index(b"nixlSDList") + len("nixlSDList|t") + 8
address = endpoint.metadata.index(b"UCX|c") + len("UCX|c") + 8
rng = random.Random(3)
engine = NixlEngine()
engine.open(EngineConfig("cpu", timeout_s=20.0))
refused = 0
for number in range(300):
    blob = bytearray(endpoint.metadata)
    blob[name + 6 : name + 12] = b"%06x" % number
    where = (rng.randrange(name, name + 38), rng.randrange(kind, kind + 4)) if number % 2 else (address,)
    where = (len(blob) - 4,) if number % 3 == 2 else where  # the kind of memory in the last registration's key
    for at in where:
        blob[at] ^= rng.randrange(1, 256) if number % 3 < 2 and number % 2 else rng.choice((0x40, 0x80, 0xBB, 0xFD))
    try:
        engine.connect(encode_endpoint(msgspec.structs.replace(endpoint, metadata=bytes(blob))), 0.5)
    except EngineError:
        refused += 1
print(refused, flush=True)
engine.close()
"""


def test_invented_metadata_with_a_right_checksum_does_not_end_the_process(endpoint: Endpoint) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _TRY],
        input=encode_endpoint(endpoint),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["300"]
