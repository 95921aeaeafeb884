"""The engines of one seed: all that work are offered, each that fails is closed and named, and all end together."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from vllm_rfork.engines.base import EngineConfig, Limits, TransferEngine
from vllm_rfork.errors import EngineError, ForkError, SeedError
from vllm_rfork.fork import engine_handle
from vllm_rfork.manifest import codec
from vllm_rfork.manifest.codec import decode_manifest, encode_manifest
from vllm_rfork.manifest.schema import EngineEndpoint, Manifest, Region, Span, TensorEntry
from vllm_rfork.seeding.engines import SeedEngines

REGIONS = (Region(4096, 1000),)
MANIFEST = Manifest(
    seed_key="k",
    fingerprint="f",
    epoch="e1",
    layout="checkpoint",
    engine="nixl",
    endpoint="",
    regions=REGIONS,
    spans=(Span(0, 4096, 1000),),
    tensors=(TensorEntry("w", "uint8", (1000,), (1,), 0),),
)
MEMORY = object()
BOUND_S = 20.0


class Engine(TransferEngine):
    """An engine of any name, open, that fails where it is told to."""

    name: ClassVar[str] = "fake"
    device_types: ClassVar[frozenset[str]] = frozenset({"cpu"})
    limits: ClassVar[Limits] = Limits(1, 1)

    def __init__(self, name: str, *, fails: str = "", endpoint: Any = None) -> None:
        self.name = name  # type: ignore[misc]
        self.fails, self.text = fails, f"{name}:endpoint" if endpoint is None else endpoint
        self.registered: list[Region] = []
        self.registrations = self.closed = 0

    def _fail(self, operation: str) -> None:
        if self.fails == operation:
            raise EngineError(self.name, operation, "the test refuses; try another machine")
        if self.fails == f"{operation} badly":
            raise MemoryError("none left")

    def open(self, config: EngineConfig) -> None: ...

    @property
    def endpoint(self) -> str:
        self._fail("endpoint")
        text: str = self.text
        return text

    def register(self, regions: Sequence[Region]) -> None:
        self._fail("register")
        self.registered = list(regions)
        self.registrations += 1

    def connect(self, endpoint: str, timeout_s: float) -> None: ...
    def read(self, endpoint: str, segments: Any, timeout_s: float) -> None: ...
    def disconnect(self, endpoint: str) -> None: ...

    @property
    def registered_nbytes(self) -> int:
        return sum(region.nbytes for region in self.registered)

    def close(self) -> None:
        self.closed += 1
        self._fail("close")
        self.registered = []


@pytest.fixture
def quarantine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TransferEngine, Any]]:
    kept: list[tuple[TransferEngine, Any]] = []
    monkeypatch.setattr(engine_handle, "_quarantine", kept)
    return kept


def offer(*engines: TransferEngine) -> tuple[SeedEngines, Manifest]:
    made = SeedEngines(engines)
    made.register(REGIONS, MEMORY, BOUND_S)
    return made, made.offer(MANIFEST, MEMORY, BOUND_S)


def test_all_engines_are_offered_and_older_receivers_find_theirs_first() -> None:
    engines, manifest = offer(Engine("cuda_ipc"), Engine("nixl"), Engine("collective"))
    assert manifest.endpoints == tuple(
        EngineEndpoint(name, f"{name}:endpoint") for name in ("nixl", "cuda_ipc", "collective")
    )
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert engines.names == ("cuda_ipc", "nixl", "collective")


def test_without_the_engine_of_older_receivers_the_preferred_one_is_first() -> None:
    _, manifest = offer(Engine("cuda_ipc"), Engine("collective"))
    assert [each.engine for each in manifest.endpoints] == ["cuda_ipc", "collective"]


def test_an_engine_that_a_fork_has_registered_is_not_registered_again() -> None:
    forked, other = Engine("nixl"), Engine("collective")
    forked.registered = list(REGIONS)
    offer(forked, other)
    assert (forked.registrations, other.registrations) == (0, 1)


@pytest.mark.parametrize("fault", ["register", "register badly", "endpoint", "endpoint badly"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_engine_that_fails_is_closed_and_left_out_by_name(
    fault: str, bad: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engines = [Engine("cuda_ipc"), Engine("nixl"), Engine("collective")]
    engines[bad].fails = fault
    made, manifest = offer(*engines)
    made.log_failures()
    made.log_failures()
    good = [engine for engine in engines if engine is not engines[bad]]
    assert {each.engine for each in manifest.endpoints} == {engine.name for engine in good}
    assert [engine.closed for engine in engines] == [int(number == bad) for number in range(3)]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert f"engine {engines[bad].name} is not offered to receivers" in line
    assert "none left" in line if "badly" in fault else "try another machine" in line


@pytest.mark.parametrize("text", [None, 7, b"bytes", "\ud800"])
def test_an_endpoint_that_is_no_text_is_left_out(text: Any) -> None:
    odd = Engine("odd")
    odd.text = text
    _, manifest = offer(odd, Engine("nixl"))
    assert [each.engine for each in manifest.endpoints] == ["nixl"]
    assert odd.closed == 1


def test_an_endpoint_that_makes_the_manifest_too_long_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(codec, "MAX_MANIFEST_NBYTES", 20_000)
    monkeypatch.setattr(codec, "MAX_CONTAINERS", 1000)
    monkeypatch.setattr(codec, "MAX_VALUES", 1000)
    long, nested, listed = Engine("a", endpoint="x" * 20_000), Engine("b", endpoint="{" * 1000), Engine("c")
    listed.text = "," * 1000
    made, manifest = offer(long, nested, Engine("collective"), listed, Engine("d", endpoint="y" * 15_000))
    made.log_failures()
    assert [each.engine for each in manifest.endpoints] == ["collective", "d"]
    assert decode_manifest(encode_manifest(manifest)) == manifest
    assert [engine.closed for engine in (long, nested, listed)] == [1, 1, 1]
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert len(lines) == 3
    assert all("the manifest has" in line and "receivers read" in line for line in lines)


def test_without_any_engine_the_reasons_of_all_are_given() -> None:
    with pytest.raises(ForkError) as caught:
        offer(Engine("nixl", fails="register"), Engine("collective", fails="register"))
    for reason in ("nixl: register failed", "collective: register failed"):
        assert reason in str(caught.value)
    with pytest.raises(ForkError, match=r"nixl: register failed.*collective"):
        offer(Engine("nixl", fails="endpoint badly"), Engine("collective", fails="endpoint badly"))
    with pytest.raises(EngineError, match="nixl: register failed"):  # the error itself, if there is only one
        offer(Engine("nixl", fails="register"))


def test_closing_goes_on_after_an_engine_that_cannot_be_closed(
    quarantine: list[tuple[TransferEngine, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    engines = [Engine("nixl", fails="close badly"), Engine("cuda_ipc"), Engine("collective", fails="close")]
    made, _ = offer(*engines)
    made.close(MEMORY, BOUND_S)
    made.close(MEMORY, BOUND_S)
    assert [engine.closed for engine in engines] == [1, 1, 1]
    assert sorted(quarantine, key=lambda kept: engines.index(kept[0])) == [(engines[0], MEMORY), (engines[2], MEMORY)]
    assert sum("stay allocated" in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("bound_s", [BOUND_S, 0.3])
def test_engines_that_take_long_to_close_cost_the_time_of_one(
    bound_s: float, quarantine: list[tuple[TransferEngine, Any]]
) -> None:
    class Slow(Engine):
        def close(self) -> None:
            time.sleep(1.0)
            raise EngineError(self.name, "close", "a native call does not return", in_flight=True)

    made = SeedEngines([Slow(name) for name in "abcd"])
    started = time.monotonic()
    made.close(MEMORY, bound_s)
    assert time.monotonic() - started < min(bound_s, 1.0) + 0.7
    deadline = time.monotonic() + 60
    while len(quarantine) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert {memory for _, memory in quarantine} == {MEMORY}


@pytest.mark.parametrize("odd", ["", "x" * 65])
def test_an_engine_whose_name_receivers_refuse_is_left_out(odd: str) -> None:
    """Names of entry points have no bound, and receivers refuse the whole manifest."""
    engines = [Engine("nixl"), Engine(odd), Engine("collective")]
    _, manifest = offer(*engines)
    assert [each.engine for each in decode_manifest(encode_manifest(manifest)).endpoints] == ["nixl", "collective"]
    assert engines[1].closed == 1


def test_engines_beyond_those_that_receivers_read_are_left_out() -> None:
    engines = [Engine(f"e{number}") for number in range(codec.MAX_ENGINES + 1)]
    _, manifest = offer(*engines)
    assert len(decode_manifest(encode_manifest(manifest)).endpoints) == codec.MAX_ENGINES
    assert engines[-1].closed == 1


def test_a_registration_that_hangs_is_given_up_and_its_memory_is_kept(
    monkeypatch: pytest.MonkeyPatch, quarantine: list[tuple[TransferEngine, Any]]
) -> None:
    monkeypatch.setattr(engine_handle, "GRACE_S", 0.0)
    go_on = threading.Event()

    class Hanging(Engine):
        """Its close waits for the call, as for a lock."""

        def register(self, regions: Sequence[Region]) -> None:
            go_on.wait(60)

        def close(self) -> None:
            go_on.wait(60)
            closed.set()
            raise EngineError(self.name, "close", "a call was under way", in_flight=True)

    closed = threading.Event()
    hanging = Hanging("nixl")
    made = SeedEngines([hanging, Engine("collective")])
    made.register(REGIONS, MEMORY, 0.2)
    assert made.names == ("collective",)
    assert not closed.is_set()
    go_on.set()
    deadline = time.monotonic() + 60
    while not quarantine and time.monotonic() < deadline:
        time.sleep(0.01)
    assert quarantine == [(hanging, MEMORY)]


def test_a_withdrawal_does_not_wait_for_the_engines_that_are_left() -> None:
    engines = [Engine("nixl"), Engine("collective")]
    made = SeedEngines(engines)

    def proceed() -> None:
        if engines[0].registrations:
            raise SeedError("the seed has been withdrawn before it was ready")

    with pytest.raises(SeedError, match="withdrawn"):
        made.register(REGIONS, MEMORY, BOUND_S, proceed)
    assert [engine.registrations for engine in engines] == [1, 0]
    made.close(MEMORY, BOUND_S)
    assert [engine.closed for engine in engines] == [1, 1]
