"""The in-memory engine keeps the port's contract, and misbehaves exactly as told."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from typing import ClassVar

import pytest

from tests.open_engines import open_engines
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import FAULT_VARIABLE, Faults, MemoryEngine, parse_faults
from vllm_rfork.engines.process_memory import process_started
from vllm_rfork.errors import ConfigError, EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.testing import EngineContract

CONFIG = EngineConfig(device="cpu")
N = 1000


class TestMemoryEngine(EngineContract):
    engine: ClassVar[str] = "memory"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.memory",)


class InProcess:
    """A seed and a receiver in this process, N bytes each."""

    def __init__(self) -> None:
        self.source = ctypes.create_string_buffer(bytes(i % 251 for i in range(N)), N)
        self.target = ctypes.create_string_buffer(N)
        self.seed = MemoryEngine(Faults())
        self.seed.open(CONFIG)
        self.seed.register([Region(ctypes.addressof(self.source), N)])

    def receiver(self, faults: Faults | None) -> MemoryEngine:
        engine = MemoryEngine(faults)
        engine.open(CONFIG)
        engine.register([Region(ctypes.addressof(self.target), N)])
        engine.connect(self.seed.endpoint, 1.0)
        return engine

    def read(self, engine: MemoryEngine, timeout_s: float = 1.0) -> None:
        half = N // 2
        source, target = ctypes.addressof(self.source), ctypes.addressof(self.target)
        segments = [Segment(target, source, half), Segment(target + half, source + half, N - half)]
        engine.read(self.seed.endpoint, segments, timeout_s)


@pytest.fixture
def pair() -> Iterator[InProcess]:
    gc.collect()
    before = len(open_engines())
    yield InProcess()
    gc.collect()
    assert len(open_engines()) <= before + 1


def test_without_faults_the_bytes_arrive(pair: InProcess) -> None:
    engine = pair.receiver(Faults())
    pair.read(engine)
    assert pair.target.raw == pair.source.raw
    engine.close()


@pytest.mark.parametrize("where", [0, 499, 500, 999])
def test_flip_byte_flips_one_bit_of_that_byte_alone(pair: InProcess, where: int) -> None:
    engine = pair.receiver(Faults(flip_byte=where))
    pair.read(engine)
    differing = [i for i in range(N) if pair.target.raw[i] != pair.source.raw[i]]
    assert differing == [where]
    engine.close()


def test_flip_byte_counts_over_all_reads(pair: InProcess) -> None:
    engine = pair.receiver(Faults(flip_byte=N + 3))
    pair.read(engine)
    assert pair.target.raw == pair.source.raw
    pair.read(engine)
    assert pair.target.raw[3] == pair.source.raw[3] ^ 1
    engine.close()


def test_fail_read_copies_half_and_says_so(pair: InProcess) -> None:
    engine = pair.receiver(Faults(fail_read=2))
    pair.read(engine)
    ctypes.memset(pair.target, 0, N)
    with pytest.raises(EngineError) as caught:
        pair.read(engine)
    assert not caught.value.in_flight
    assert pair.target.raw[: N // 2] == pair.source.raw[: N // 2]
    assert not any(pair.target.raw[N // 2 :])
    engine.close()


def test_truncate_read_leaves_the_last_byte_out_silently(pair: InProcess) -> None:
    engine = pair.receiver(Faults(truncate_read=1))
    pair.read(engine)
    assert pair.target.raw[: N - 1] == pair.source.raw[: N - 1]
    assert pair.target.raw[N - 1] == 0 != pair.source.raw[N - 1]
    engine.close()


def test_stall_read_ends_at_its_deadline_with_nothing_written(pair: InProcess) -> None:
    engine = pair.receiver(Faults(stall_read=1))
    with pytest.raises(EngineError):
        pair.read(engine, timeout_s=0.05)
    assert not any(pair.target.raw)
    engine.close()


def test_late_read_lands_unless_close_comes_first(pair: InProcess) -> None:
    for closes_first in (True, False):
        engine = pair.receiver(Faults(late_read=1, late_s=30.0 if closes_first else 0.0))
        with pytest.raises(EngineError) as caught:
            pair.read(engine, timeout_s=0.01)
        assert caught.value.in_flight
        if not closes_first:
            engine._late[0]._thread.join(60)
        engine.close()
        assert (pair.target.raw == pair.source.raw) is not closes_first


def test_an_endpoint_that_names_this_process_and_memory_it_does_not_have_is_refused() -> None:
    engine = MemoryEngine()
    engine.open(CONFIG)
    pid = os.getpid()
    with pytest.raises(EngineError, match="connect failed"):
        engine.connect(f"memory:{pid}:{process_started(pid)}:4096:{'00' * 16}", 1.0)
    engine.close()


@pytest.mark.parametrize("operation", ["open", "register", "connect", "close"])
def test_each_call_can_be_made_to_fail(pair: InProcess, operation: str) -> None:
    faults = Faults(**{f"{operation}_fails": True})
    region = Region(ctypes.addressof(pair.target), N)
    engine = MemoryEngine(faults)

    def all_calls() -> None:
        engine.open(CONFIG)
        engine.register([region])
        engine.connect(pair.seed.endpoint, 1.0)
        engine.close()

    with pytest.raises(EngineError) as caught:
        all_calls()
    assert caught.value.operation == operation
    assert caught.value.in_flight is (operation == "close")


def test_the_environment_variable_gives_the_faults(monkeypatch: pytest.MonkeyPatch, pair: InProcess) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, "flip_byte=17, fail_read=2")
    engine = pair.receiver(None)
    pair.read(engine)
    assert pair.target.raw[17] == pair.source.raw[17] ^ 1
    with pytest.raises(EngineError):
        pair.read(engine)
    engine.close()


def test_faults_are_parsed_or_refused() -> None:
    assert parse_faults("") == Faults()
    assert parse_faults("open_fails,late_s=1.5,stall_read=3") == Faults(open_fails=True, late_s=1.5, stall_read=3)
    for text in ("explode", "fail_read=often"):
        with pytest.raises(ConfigError):
            parse_faults(text)


def test_only_host_memory() -> None:
    with pytest.raises(EngineError, match="cuda"):
        MemoryEngine(Faults()).open(EngineConfig(device="cuda:0"))
