"""The Mooncake adapter over an engine in this process that obeys, fails and hangs as its tests want."""

from __future__ import annotations

import ctypes
import gc
import importlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.mooncake import ascend, native, wheels
from vllm_rfork.engines.mooncake.engine import MooncakeEngine
from vllm_rfork.engines.registry import ENGINES
from vllm_rfork.errors import EngineError, EngineUnavailable
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

CONFIG = EngineConfig(device="cpu", timeout_s=5.0)
NBYTES = 4096


class Native:
    """Mooncake's object, as far as the adapter uses it: reads copy within this process."""

    living: ClassVar[int] = 0
    calls: ClassVar[list[tuple[str, tuple[Any, ...]]]]
    codes: ClassVar[dict[str, list[Any]]]
    hang: ClassVar[threading.Event]

    def __init__(self) -> None:
        Native.living += 1

    def __del__(self) -> None:
        Native.living -= 1

    def _answer(self, method: str, *arguments: Any) -> int:
        Native.calls.append((method, arguments))
        scripted = Native.codes.get(method)
        code = scripted.pop(0) if scripted else 0
        if isinstance(code, Exception):
            raise code
        if code == "hang":
            Native.hang.wait(30)
            return -1
        return int(code)

    def initialize(self, host: str, metadata: str, protocol: str, devices: str) -> int:
        return self._answer("initialize", host, metadata, protocol, devices)

    def get_rpc_port(self) -> int:
        return 15123

    def batch_register_memory(self, addresses: list[int], lengths: list[int]) -> int:
        return self._answer("register", addresses, lengths)

    def batch_transfer_sync_read(self, session: str, local: list[int], remote: list[int], lengths: list[int]) -> int:
        code = self._answer("read", session, local, remote, lengths)
        if code == 0:
            for to, source, nbytes in zip(local, remote, lengths, strict=True):
                ctypes.memmove(to, source, nbytes)
        return code


@pytest.fixture(autouse=True)
def _mooncake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MC_FORCE_TCP", "1")
    module = SimpleNamespace(TransferEngine=Native, SUPPORT_CUDA=False)
    real = importlib.import_module
    monkeypatch.setattr(native.importlib, "import_module", lambda name: module if name == native.MODULE else real(name))
    Native.calls, Native.codes, Native.hang = [], {}, threading.Event()
    yield
    Native.hang.set()
    native_threads = [each for each in threading.enumerate() if each.name.startswith("rfork-mooncake")]
    for thread in native_threads:
        thread.join(10)
    gc.collect()
    assert Native.living == 0, "an engine was not destroyed"


@pytest.fixture
def engine() -> Iterator[MooncakeEngine]:
    """An open engine."""
    opened = MooncakeEngine()
    opened.open(CONFIG)
    yield opened
    Native.hang.set()
    opened.close()


@pytest.fixture
def pair(engine: MooncakeEngine) -> tuple[MooncakeEngine, str, int, int]:
    """A receiver that is its own seed, its endpoint, and two halves of one registered buffer."""
    memory = ctypes.create_string_buffer(bytes(range(256)) * 16 + bytes(NBYTES), 2 * NBYTES)
    engine.memory = memory  # type: ignore[attr-defined]
    address = ctypes.addressof(memory)
    engine.register([Region(address, 2 * NBYTES)])
    endpoint = engine.endpoint
    engine.connect(endpoint, 5.0)
    return engine, endpoint, address, address + NBYTES


def count(method: str) -> int:
    return sum(name == method for name, _ in Native.calls)


# -- open --------------------------------------------------------------------------------------------------------------


def test_it_opens_over_the_protocol_of_the_device(engine: MooncakeEngine) -> None:
    assert Native.calls[0] == ("initialize", ("127.0.0.1", "P2PHANDSHAKE", "tcp", ""))
    assert '"session":"127.0.0.1:15123"' in engine.endpoint
    assert engine.registered_nbytes == 0


@pytest.mark.parametrize(("device", "reason"), [("xpu:0", "cannot read the memory of xpu:0"), ("", "cannot read")])
def test_a_device_that_it_cannot_read_is_refused(device: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        MooncakeEngine().open(EngineConfig(device=device))


def test_a_wheel_without_gpus_names_the_wheels_that_have_them() -> None:
    with pytest.raises(EngineUnavailable, match=r"mooncake-cuda13\]' for CUDA 13 or .*mooncake-cuda12") as caught:
        MooncakeEngine().open(EngineConfig(device="cuda:0"))
    assert caught.value.operation == "open"


@pytest.mark.parametrize(
    ("error", "device_type", "reason"),
    [
        (ModuleNotFoundError("none", name="mooncake"), "cpu", r"not installed.*vllm-rfork\[mooncake-cpu\]"),
        (ModuleNotFoundError("none", name="mooncake"), "npu", r"not installed.*vllm-rfork\[mooncake-npu\]"),
        (ModuleNotFoundError("none", name="msgpack"), "cpu", "needs msgpack"),
        (ImportError("libibverbs.so.1: cannot open shared object file"), "cpu", "apt-get install libibverbs1"),
        (ImportError("libcudart.so.12: cannot open shared object file"), "cpu", r"vllm-rfork\[mooncake-cpu\]"),
        (ImportError("libcudart.so.12: cannot open shared object file"), "cuda", r"mooncake-cuda13\]' for CUDA 13"),
    ],
)
def test_what_is_missing_is_named_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, error: Exception, device_type: str, reason: str
) -> None:
    def fails(name: str) -> Any:
        raise error

    monkeypatch.setattr(native.importlib, "import_module", fails)
    with pytest.raises(EngineUnavailable, match=reason):
        native.load_engine_class(device_type)


def test_two_wheels_and_one_for_efa_are_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"mooncake-transfer-engine": "0.3.13", "mooncake-transfer-engine-efa": "0.3.13"}

    def version(name: str) -> str:
        if name not in there:
            raise wheels.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(wheels, "version", version)
    assert wheels.installed() == there
    assert wheels.with_efa()
    del there["mooncake-transfer-engine-efa"]
    assert not wheels.with_efa()


def test_a_start_that_fails_leaves_nothing() -> None:
    engine = MooncakeEngine()
    for codes in ({"initialize": [-1]}, {"register": [-3]}, {"initialize": [RuntimeError("no")]}):
        Native.codes = codes
        with pytest.raises(EngineError) as caught:
            engine.open(CONFIG)
        assert not caught.value.in_flight
        engine.close()


def test_a_start_that_hangs_is_given_up() -> None:
    Native.codes = {"initialize": ["hang"]}
    with pytest.raises(EngineError, match="did not return in time") as caught:
        MooncakeEngine().open(EngineConfig(device="cpu", timeout_s=0.1))
    assert (caught.value.operation, caught.value.in_flight) == ("open", False)


def test_doctor_gets_the_protocol_and_the_reason() -> None:
    assert MooncakeEngine.self_check() == "an engine opens, over tcp (MC_FORCE_TCP is set)"
    assert MooncakeEngine.lane_to("elsewhere", "cuda") == "mooncake/tcp"
    assert MooncakeEngine.lane_to("container", "npu") == "mooncake/ascend"


@pytest.mark.parametrize(("driver", "extra"), [("cuda", "mooncake-cuda13"), ("npu", "mooncake-npu")])
def test_doctor_names_the_wheel_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str, extra: str
) -> None:
    def fails(name: str) -> Any:
        raise ModuleNotFoundError("none", name="mooncake")

    monkeypatch.setattr(native.importlib, "import_module", fails)
    monkeypatch.setitem(wheels._DRIVERS, driver, tmp_path)
    with pytest.raises(EngineUnavailable, match=rf"vllm-rfork\[{extra}\]"):
        MooncakeEngine.self_check()


def test_an_npu_is_selected_on_the_thread_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    selected: list[tuple[int, str]] = []

    def select(device: Any) -> int:
        selected.append((device.value, threading.current_thread().name))
        return 0

    monkeypatch.setattr(ascend, "ascend_runtime", lambda engine: SimpleNamespace(aclrtSetDevice=select))
    engine = MooncakeEngine()
    engine.open(EngineConfig(device="npu:3"))
    assert Native.calls[0][1][2] == "ascend"
    assert {number for number, _ in selected} == {3}
    assert all(name.startswith("rfork-mooncake-") for _, name in selected)
    engine.close()
    monkeypatch.setattr(ascend, "ascend_runtime", lambda engine: SimpleNamespace(aclrtSetDevice=lambda _: 507033))
    with pytest.raises(EngineError, match="aclrtSetDevice"):
        engine.open(EngineConfig(device="npu:3"))


# -- read --------------------------------------------------------------------------------------------------------------


def test_items_are_read_a_thousand_at_a_time_and_the_identity_last(pair: tuple[MooncakeEngine, str, int, int]) -> None:
    engine, endpoint, source, target = pair
    before = count("read")
    engine.read(endpoint, [Segment(target + i, source + i, 1) for i in range(2500)], 5.0)
    batches = [len(arguments[1]) for name, arguments in Native.calls if name == "read"][before:]
    assert batches == [1000, 1000, 500, 1]
    assert ctypes.string_at(target, 2500) == ctypes.string_at(source, 2500)
    assert engine.lane(endpoint) == "mooncake/tcp"
    assert engine.lane("nobody") == "mooncake"


def test_a_failed_read_leaves_only_close(pair: tuple[MooncakeEngine, str, int, int]) -> None:
    engine, endpoint, source, target = pair
    Native.codes = {"read": [-1]}
    with pytest.raises(EngineError, match="own log") as caught:
        engine.read(endpoint, [Segment(target, source, 1)], 5.0)
    assert (caught.value.in_flight, caught.value.side, caught.value.code) == (True, "unknown", "-1")
    with pytest.raises(EngineError, match="given up") as caught:
        engine.connect(endpoint, 5.0)
    assert caught.value.in_flight
    engine.close()
    assert engine.registered_nbytes == 0


def test_a_seed_that_closed_during_the_read_is_noticed(pair: tuple[MooncakeEngine, str, int, int]) -> None:
    engine, endpoint, source, target = pair
    engine._page[:16] = bytes(16)
    with pytest.raises(EngineError, match="the seed has closed") as caught:
        engine.read(endpoint, [Segment(target, source, 1)], 5.0)
    assert (caught.value.in_flight, caught.value.side, caught.value.retry_elsewhere) == (False, "seed", True)


def test_an_address_outside_the_seeds_regions_never_reaches_mooncake(
    pair: tuple[MooncakeEngine, str, int, int],
) -> None:
    engine, endpoint, source, target = pair
    before = count("read")
    with pytest.raises(EngineError, match="do not lie in one registered region") as caught:
        engine.read(endpoint, [Segment(target, source - 1, 1)], 5.0)
    assert (caught.value.side, caught.value.in_flight) == ("seed", False)
    assert count("read") == before


def test_close_gives_up_a_read_in_another_thread(pair: tuple[MooncakeEngine, str, int, int]) -> None:
    engine, endpoint, source, target = pair
    Native.codes = {"read": ["hang"]}
    failures: list[EngineError] = []

    def read() -> None:
        try:
            engine.read(endpoint, [Segment(target, source, 1)], 30.0)
        except EngineError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    while Native.codes["read"]:
        time.sleep(0.01)
    threading.Timer(0.3, Native.hang.set).start()
    engine.close()
    thread.join(10)
    assert "closing" in failures[0].text
    assert failures[0].in_flight


def test_a_call_that_never_returns_keeps_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MooncakeEngine()
    engine.open(EngineConfig(device="cpu", timeout_s=0.2))
    Native.codes = {"register": ["hang"]}
    with pytest.raises(EngineError, match="did not return in time") as caught:
        engine.register([Region(NBYTES, 1)])
    assert (caught.value.operation, caught.value.in_flight) == ("register", True)
    assert engine.registered_nbytes == 0
    with pytest.raises(EngineError) as caught:
        engine.close()
    assert (caught.value.operation, caught.value.in_flight) == ("close", True)
    Native.hang.set()
    engine.close()
    engine.close()


def test_a_registration_that_fails_registers_nothing(engine: MooncakeEngine) -> None:
    Native.codes = {"register": [-1]}
    with pytest.raises(EngineError, match="cannot register") as caught:
        engine.register([Region(NBYTES, 1)])
    assert (engine.registered_nbytes, caught.value.in_flight) == (0, False)
    engine.register([Region(NBYTES, 1)])
    assert engine.registered_nbytes == 1


def test_arguments_that_mooncake_rejects_are_an_error(engine: MooncakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # As Mooncake's, its error has no frame that refers to the object.
    monkeypatch.setattr(Native, "batch_register_memory", staticmethod(len))
    with pytest.raises(EngineError, match="TypeError") as caught:
        engine.register([Region(NBYTES, 1)])
    assert caught.value.side == "receiver"


# -- lanes -------------------------------------------------------------------------------------------------------------


def test_an_obstacle_is_found_without_an_engine(engine: MooncakeEngine) -> None:
    endpoint = engine.endpoint
    assert MooncakeEngine.lane_obstacle(endpoint, CONFIG) is None
    assert "cpu memory" in (MooncakeEngine.lane_obstacle(endpoint, EngineConfig(device="cuda:1")) or "")
    with pytest.raises(EngineError, match="not an endpoint") as caught:
        MooncakeEngine.lane_obstacle("nonsense", CONFIG)
    assert (caught.value.side, caught.value.retry_elsewhere) == ("seed", True)


def test_the_distributions_are_those_of_the_extras() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = dict(re.findall(r'^(mooncake-[\w-]+) = \["([\w-]+)>', text, re.MULTILINE))
    assert sorted(extras.values()) == sorted(ENGINES["mooncake"].packages)
    assert {extra for each in wheels._EXTRAS.values() for extra in each} <= set(extras)


def test_a_second_close_does_not_claim_that_the_read_has_ended(
    pair: tuple[MooncakeEngine, str, int, int],
) -> None:
    engine, endpoint, source, target = pair
    engine._calls.timeout_s = 0.3
    Native.codes["read"] = ["hang"]
    with pytest.raises(EngineError) as caught:
        engine.read(endpoint, [Segment(target, source, NBYTES)], 0.3)
    assert caught.value.in_flight
    for _ in range(2):
        with pytest.raises(EngineError) as caught:
            engine.close()
        assert caught.value.in_flight


def test_an_engine_that_does_not_open_is_destroyed() -> None:
    Native.codes["register"] = [-1]
    with pytest.raises(EngineError) as caught:
        MooncakeEngine().open(CONFIG)
    assert caught.value  # its traceback has the frames
    assert Native.living == 0
