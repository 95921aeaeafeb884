"""The NIXL adapter's own promises: errors translated, environment untouched, the agent gone after close."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import time
import types
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.nixl import agent as nixl_agent
from vllm_rfork.engines.nixl.agent import LOST, Agent, load_bindings, native_errors
from vllm_rfork.engines.nixl.engine import NixlEngine
from vllm_rfork.engines.nixl.reader import halves, runs
from vllm_rfork.engines.process_memory import touch
from vllm_rfork.errors import EngineError, EngineUnavailable
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

CONFIG = EngineConfig(device="cpu", timeout_s=20.0)
N = 1 << 20


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    made = Agent("unit-test", "DRAM", emulation=False)
    yield made
    assert made.destroy()


def bindings_errors() -> list[type[BaseException]]:
    return [
        value for value in vars(load_bindings()).values() if isinstance(value, type) and issubclass(value, Exception)
    ]


def test_nixl_has_errors_at_all() -> None:
    assert LOST in {error.__name__ for error in bindings_errors()}
    assert len(bindings_errors()) > 5


@pytest.mark.parametrize("error", [*bindings_errors(), RuntimeError, ValueError, TypeError, MemoryError, IndexError])
def test_every_native_error_becomes_ours_with_its_name(agent: Agent, error: type[BaseException]) -> None:
    assert error in native_errors(load_bindings())
    with pytest.raises(EngineError, match="boom") as caught, agent.translated("read", in_flight=True):
        raise error("boom")
    ours = caught.value
    assert (ours.engine, ours.operation, ours.code, ours.in_flight) == ("nixl", "read", error.__name__, True)
    assert isinstance(ours.__cause__, error)
    assert ours.retry_elsewhere is (error.__name__ == LOST)


def test_without_any_nixl_the_hint_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "MODULES", ("nixl_nowhere", "nixl_neither"))
    with pytest.raises(EngineUnavailable, match="pip install") as caught:
        NixlEngine().open(CONFIG)
    assert caught.value.engine == "nixl"


def test_another_package_that_is_missing_is_not_taken_for_nixl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]
) -> None:
    """NIXL is there and broken: trying the next name would hide why."""
    package = os.path.join(tmp_path, "nixl_broken")
    os.mkdir(package)
    with open(os.path.join(package, "__init__.py"), "w") as file:
        file.write("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(nixl_agent, "MODULES", ("nixl_broken", "nixl_cu13"))
    with pytest.raises(EngineUnavailable, match="surely_not_installed"):
        load_bindings()


def test_a_package_that_is_there_is_found_behind_one_that_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("nixl_fake._bindings")
    monkeypatch.setitem(sys.modules, "nixl_fake", types.ModuleType("nixl_fake"))
    monkeypatch.setitem(sys.modules, "nixl_fake._bindings", fake)
    monkeypatch.setattr(nixl_agent, "MODULES", ("nixl_nowhere", "nixl_fake"))
    assert load_bindings() is fake


def test_a_failed_open_leaves_an_engine_that_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = NixlEngine()
    with monkeypatch.context() as patch:
        patch.setattr(nixl_agent, "MODULES", ("nixl_nowhere",))
        with pytest.raises(EngineUnavailable):
            engine.open(CONFIG)
    engine.close()
    engine.open(CONFIG)
    engine.close()


@pytest.mark.parametrize("device", ["npu:0", "xpu", "cpu-ish"])
def test_devices_it_cannot_read_are_refused(device: str) -> None:
    with pytest.raises(EngineError, match=device):
        NixlEngine().open(EngineConfig(device=device))


def test_the_environment_is_left_as_it_was() -> None:
    """Other users of UCX and NIXL in this process read it too."""
    before = dict(os.environ)
    engine = NixlEngine()
    engine.open(CONFIG)
    assert dict(os.environ) == before
    engine.close()
    assert dict(os.environ) == before


class Two:
    """A seed and a receiver in this process."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.source = ctypes.create_string_buffer(os.urandom(N) * (nbytes // N), nbytes)
        self.target = ctypes.create_string_buffer(nbytes)
        self.seed, self.receiver = NixlEngine(), NixlEngine()
        for engine, memory in ((self.seed, self.source), (self.receiver, self.target)):
            engine.open(CONFIG)
            engine.register([Region(ctypes.addressof(memory), nbytes)])
        self.endpoint = self.seed.endpoint
        self.receiver.connect(self.endpoint, 10.0)
        self.segment = Segment(ctypes.addressof(self.target), ctypes.addressof(self.source), nbytes)

    def close(self) -> None:
        self.receiver.close()
        self.seed.close()


def test_seed_and_receiver_in_one_process() -> None:
    two = Two(N)
    two.receiver.read(two.endpoint, [two.segment], 10.0)
    assert two.target.raw == two.source.raw
    two.close()
    assert (two.seed.registered_nbytes, two.receiver.registered_nbytes) == (0, 0)


def test_a_seed_that_closed_between_reads_is_noticed() -> None:
    """Its memory would still be readable; what stands there is nobody's weights any more."""
    two = Two(N)
    two.receiver.read(two.endpoint, [two.segment], 10.0)
    two.seed.close()
    with pytest.raises(EngineError) as caught:
        two.receiver.read(two.endpoint, [two.segment], 10.0)
    assert caught.value.operation == "read"
    assert caught.value.retry_elsewhere
    two.close()


def test_a_seed_that_closes_while_it_is_read_is_noticed() -> None:
    """The bytes may all have arrived; that the seed was still open when they had is looked at last."""
    two = Two(N)
    ctypes.memset(two.seed._page, 0, 16)
    with pytest.raises(EngineError, match="closed"):
        two.receiver.read(two.endpoint, [two.segment], 10.0)
    two.close()


def test_close_ends_a_read_in_another_thread() -> None:
    """The read raises or had all its bytes; close waits for it, and nothing is registered afterwards."""
    two = Two(64 * N)
    failures: list[BaseException] = []
    started = threading.Event()

    def read() -> None:
        try:
            while True:
                two.receiver.read(two.endpoint, [two.segment], 10.0)
                started.set()
        except EngineError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(30)
    two.receiver.close()
    thread.join(30)
    assert not thread.is_alive()
    assert len(failures) == 1
    assert two.receiver.registered_nbytes == 0
    two.close()


def test_close_gives_threads_and_descriptors_back() -> None:
    """Also with an error kept alive, whose traceback must not keep the agent."""
    warm = Two(N)
    warm.close()
    before = counts()
    kept = []
    for _ in range(3):
        two = Two(N)
        with pytest.raises(EngineError) as caught:
            two.receiver.read(two.endpoint, [two.segment._replace(nbytes=N + 1)], 5.0)
        kept.append(caught.value)
        with pytest.raises(EngineError) as caught:
            two.receiver.connect(two.endpoint.replace('"device":0', '"device":-1'), 5.0)
        kept.append(caught.value)
        two.close()
    deadline = time.monotonic() + 10.0
    while counts() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert counts() <= before, f"{len(kept)} kept errors hold an agent"


def counts() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def test_work_in_python_goes_on_during_a_read() -> None:
    """The GIL is free: another thread gets its turns while native code copies."""
    two = Two(64 * N)
    turns = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    before = turns
    two.receiver.read(two.endpoint, [two.segment], 10.0)
    during = turns - before
    stop.set()
    thread.join()
    assert during > 10
    two.close()


@given(st.lists(st.integers(1, 50_000), max_size=20))
def test_halves_cover_every_byte_once_in_order(lengths: list[int]) -> None:
    segments = [Segment(1_000_000 * n, 2_000_000 * n, nbytes) for n, nbytes in enumerate(lengths, start=1)]
    first, rest = halves(segments)
    assert abs(sum(s.nbytes for s in first) - sum(s.nbytes for s in rest)) <= 2 * 4096
    pieces = iter(first + rest)
    for segment in segments:
        done = 0
        while done < segment.nbytes:
            piece = next(pieces)
            assert piece == Segment(segment.local + done, segment.remote + done, piece.nbytes)
            assert piece.nbytes > 0
            done += piece.nbytes
        assert done == segment.nbytes
    assert next(pieces, None) is None


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50)), max_size=20))
def test_runs_cover_the_same_bytes_with_as_few_pieces_as_can_be(gaps: list[tuple[int, int]]) -> None:
    segments, at = [], 1000
    for gap, nbytes in gaps:
        segments.append(Segment(at + gap, 0, nbytes))
        at += gap + nbytes
    covered = [address + n for address, nbytes in runs(segments) for n in range(nbytes)]
    assert covered == [segment.local + n for segment in segments for n in range(segment.nbytes)]
    assert len(list(runs(segments))) == sum(gap > 0 for gap, _ in gaps[1:]) + bool(gaps)


def test_touching_memory_changes_none_of_it() -> None:
    nbytes = 64 * mmap.PAGESIZE
    with mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[5 * mmap.PAGESIZE] = 77
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        touch(address + 1, nbytes - 2)
        assert memory[:] == bytes(5 * mmap.PAGESIZE) + b"M" + bytes(nbytes - 5 * mmap.PAGESIZE - 1)
        touch(1 << 46, 10)  # nobody's memory: a hint that cannot be followed is no error


def test_a_refused_part_keeps_the_other_from_starting() -> None:
    """Both parts are accepted before either moves a byte."""
    two = Two(16 * N)
    good, bad = (
        two.segment._replace(nbytes=16 * N),
        two.segment._replace(remote=two.segment.remote + 15 * N, nbytes=N * 2),
    )
    with pytest.raises(EngineError):
        two.receiver.read(two.endpoint, [good, bad], 10.0)
    assert not any(two.target.raw)
    two.close()
