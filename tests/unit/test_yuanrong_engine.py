"""The YuanRong adapter against wheels that are made up: what differs between generations, and what goes wrong."""

from __future__ import annotations

import ctypes
import gc
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from vllm_rfork.engines import native_library
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.yuanrong import engine as yuanrong
from vllm_rfork.engines.yuanrong import native as yuanrong_native
from vllm_rfork.engines.yuanrong.engine import YuanRongEngine, device_number
from vllm_rfork.engines.yuanrong.native import CODES, AclRuntime, Binding, code_name, failure, load_binding
from vllm_rfork.engines.yuanrong.peer import parse_endpoint, probe
from vllm_rfork.errors import EngineError, EngineUnavailable
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

CONFIG = EngineConfig(device="npu:0", host="127.0.0.1", timeout_s=5.0)
REGIONS = [Region(0x1000, 100), Region(0x2000, 100), Region(0x3000, 100)]


class Code(int):
    @property
    def name(self) -> str:
        return CODES[int(self)]


class Answer:
    def __init__(self, code: int = 0, text: str = "") -> None:
        self.code, self.text = code, text

    def is_error(self) -> bool:
        return self.code != 0

    def get_code(self) -> Code:
        return Code(self.code)

    def get_msg(self) -> str:
        return self.text

    def to_string(self) -> str:
        return f"code={self.code}, msg={self.text}, file=/some/where.cpp"


class Native:
    """A wheel's engine; ``script`` holds the answers to come for each operation, success where it runs out."""

    script: ClassVar[dict[str, list[Any]]] = {}
    made: ClassVar[list[Native]] = []

    def __init__(self) -> None:
        Native.made.append(self)
        self.calls: list[tuple[Any, ...]] = []

    def _do(self, operation: str, *arguments: Any) -> Answer:
        self.calls.append((operation, *arguments))
        waiting = Native.script.get(operation, [])
        answer = waiting.pop(0) if waiting else Answer()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Answer)
        return answer

    def initialize(self, *arguments: Any) -> Answer:
        return self._do("initialize", *arguments)

    def batch_register_memory(self, *arguments: Any) -> Answer:
        return self._do("register", *arguments)

    def batch_transfer_sync_read(self, *arguments: Any) -> Answer:
        return self._do("read", *arguments)

    def finalize(self) -> Answer:
        return self._do("finalize")

    def called(self, operation: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == operation]


def only_native() -> weakref.ref[Native]:
    """The one engine made, held by nothing here."""
    (native,) = Native.made
    Native.made.clear()
    return weakref.ref(native)


class Acl:
    has_device_memory = True

    def __init__(self) -> None:
        self.threads: list[tuple[int, int]] = []

    def ensure_context(self, device: int) -> None:
        self.threads.append((threading.get_ident(), device))


@pytest.fixture
def hixl(request: pytest.FixtureRequest) -> bool:
    return bool(getattr(request, "param", False))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, hixl: bool) -> Iterator[YuanRongEngine]:
    Native.script = {}
    Native.made.clear()
    monkeypatch.setattr(yuanrong, "load_binding", lambda: Binding(Native, hixl))
    monkeypatch.setattr(yuanrong, "AclRuntime", Acl)
    monkeypatch.setattr(yuanrong, "_NOT_READY_PAUSE_S", 0.001)
    made = YuanRongEngine()
    yield made
    Native.script = {}
    made.close()


@pytest.fixture
def peer() -> Iterator[str]:
    """A port that answers every probe as an engine does."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"TERP\x02\0\0\0\x0b\0\0\0\0\0\0\0\x02ok\0")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)


def reading(engine: YuanRongEngine, peer: str) -> None:
    engine.open(CONFIG)
    engine.register(REGIONS)
    engine.connect(peer, 5.0)


def segments(count: int) -> list[Segment]:
    return [Segment(region.address, 0x9000 + i, 10) for i, region in enumerate(REGIONS[:count])]


# -- import ----------------------------------------------------------------------------------------------------------


def test_an_absent_wheel_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yr", None)
    monkeypatch.setitem(sys.modules, "yr.datasystem", None)
    with pytest.raises(EngineUnavailable, match=r"not installed.*pip install 'vllm-rfork\[ascend\]'"):
        load_binding()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("libunwind.so.8: cannot open shared object file"), "apt-get install libunwind8"),
        (ImportError("libother.so.1: cannot open shared object file"), "libother"),
        (OSError("something wrong in libp2p"), "something wrong in libp2p"),
        (ModuleNotFoundError("No module named 'numpy'", name="numpy"), "numpy"),
    ],
)
def test_a_wheel_that_cannot_be_loaded_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    """Not that it is not installed, which would send the user on the wrong way."""

    def importing(_: str) -> ModuleType:
        raise error

    monkeypatch.setattr(yuanrong_native.importlib, "import_module", importing)
    with pytest.raises(EngineUnavailable) as caught:
        load_binding()
    assert told in str(caught.value)
    assert "is not installed" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_the_error_that_datasystem_hides_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"no attribute {name}; bindings failed to import: libunwind.so.8: cannot open")

    monkeypatch.setattr(yuanrong_native.importlib, "import_module", lambda _: Module("yr.datasystem"))
    with pytest.raises(EngineUnavailable, match="libunwind8"):
        load_binding()


@pytest.mark.parametrize(
    ("contents", "attributes", "expected"),
    [
        (b"...TRANSFER_ENGINE_P2P_SO_PATH...", {}, False),
        (b"...TRANSFER_ENGINE_HIXL_ROUTE...", {}, True),
        (b"...YR_TE_HIXL_ROUTE...", {}, True),
        (b"", {"MemoryRegistration": object}, True),
    ],
)
def test_the_generation_with_bounded_calls_is_recognized_by_what_it_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, contents: bytes, attributes: dict[str, object], expected: bool
) -> None:
    (tmp_path / "native.so").write_bytes(contents)
    engine_class = type("TransferEngine", (), {"__module__": "yr.datasystem._transfer_engine"})
    modules = {
        "yr.datasystem": SimpleNamespace(TransferEngine=engine_class, **attributes),
        "yr.datasystem._transfer_engine": SimpleNamespace(__file__=str(tmp_path / "native.so")),
    }
    monkeypatch.setattr(yuanrong_native.importlib, "import_module", modules.__getitem__)
    assert load_binding().bounds_control_calls is expected
    assert not load_binding().chooses_port


@pytest.mark.parametrize(
    ("members", "newest"),
    [
        ({"get_rpc_port"}, False),  # datasystem 0.8.1, which rejects port 0
        ({"get_rpc_port", "get_route_policy"}, True),
    ],
)
def test_the_newest_generation_is_recognized_by_its_members(
    monkeypatch: pytest.MonkeyPatch, members: set[str], newest: bool
) -> None:
    engine_class = type("TransferEngine", (), {name: lambda self: None for name in members})
    engine_class.__module__ = __name__  # a file that names no variable of HIXL beside the two in this test
    monkeypatch.setattr(yuanrong_native, "_HIXL_VARIABLES", ())
    module = SimpleNamespace(TransferEngine=engine_class)
    modules = {"yr.datasystem": module, __name__: sys.modules[__name__]}
    monkeypatch.setattr(yuanrong_native.importlib, "import_module", modules.__getitem__)
    assert load_binding() == Binding(engine_class, newest, newest)


# -- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "name"), CODES.items())
def test_every_code_arrives_by_name_with_the_engines_own_text(code: int, name: str) -> None:
    error = failure("read", Answer(code, "what it said"))
    assert (error.engine, error.operation, error.code) == ("yuanrong", "read", name)
    assert error.text == "what it said"
    elsewhere = name in {"kNotFound", "kRuntimeError", "kNotReady", "kNotAuthorized"}
    assert error.retry_elsewhere is elsewhere
    assert not failure("open", Answer(code, "x")).retry_elsewhere


def test_a_code_of_the_future_still_has_a_name() -> None:
    class Bare(Answer):
        def get_code(self) -> Any:
            return 77

    assert code_name(Bare(77)) == "code 77"
    assert code_name(SimpleNamespace(get_code=lambda: 9)) == "kNotAuthorized"


@pytest.mark.parametrize("error", [TypeError("incompatible"), RuntimeError("C++"), MemoryError(), OverflowError("big")])
def test_no_foreign_exception_comes_out(engine: YuanRongEngine, error: Exception) -> None:
    engine.open(CONFIG)
    Native.script = {"register": [error]}
    with pytest.raises(EngineError) as caught:
        engine.register(REGIONS)
    assert caught.value.__cause__ is error
    assert engine.registered_nbytes == 0


# -- open and close --------------------------------------------------------------------------------------------------


def test_a_port_that_somebody_took_is_tried_elsewhere(engine: YuanRongEngine) -> None:
    Native.script = {"initialize": [Answer(5, "bind failed"), Answer(2, "port is taken")]}
    engine.open(CONFIG)
    tried = [native.called("initialize")[0] for native in Native.made]
    assert len(tried) == 3
    assert {arguments[1:] for arguments in tried} == {("ascend", "npu:0")}
    assert engine.endpoint == tried[-1][0]


def test_another_failure_to_start_is_not_repeated(engine: YuanRongEngine) -> None:
    Native.script = {"initialize": [Answer(2, "device_name is invalid")]}
    with pytest.raises(EngineError, match="device_name is invalid") as caught:
        engine.open(CONFIG)
    assert caught.value.operation == "open"
    assert len(Native.made) == 1
    engine.open(CONFIG)


def test_ports_that_are_all_taken_end_the_attempts(engine: YuanRongEngine) -> None:
    Native.script = {"initialize": [Answer(5, "bind failed")] * 100}
    with pytest.raises(EngineError, match="bind failed"):
        engine.open(CONFIG)
    assert len(Native.made) == 16


def test_a_new_object_is_made_after_close(engine: YuanRongEngine) -> None:
    """The old one remembers registrations that are gone."""
    engine.open(CONFIG)
    engine.register(REGIONS)
    engine.close()
    assert engine.registered_nbytes == 0
    engine.open(CONFIG)
    engine.register(REGIONS)
    assert len(Native.made) == 2
    assert Native.made[0].called("finalize") == [()]


def test_close_destroys_the_native_engine(engine: YuanRongEngine) -> None:
    engine.open(CONFIG)
    native = only_native()
    engine.close()
    assert native() is None


def test_host_memory_on_a_machine_with_npus_is_refused(engine: YuanRongEngine) -> None:
    with pytest.raises(EngineError, match="NPU memory"):
        engine.open(EngineConfig(device="cpu"))


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("npu", "", 0),
        ("npu:3", "", 3),
        ("npu:1", "4,5", 1),  # the second of those that the process sees, which is the machine's number 5
        ("npu:7", "0-7", 7),  # a form we do not parse is the engine's business
        ("cpu", "4,5", 0),
        ("cpu:1", "", 0),
    ],
)
def test_the_device_number_counts_as_the_process_sees_devices(device: str, visible: str, expected: int) -> None:
    assert device_number(device, {"ASCEND_RT_VISIBLE_DEVICES": visible}) == expected


@pytest.mark.parametrize(("device", "visible"), [("npu:2", "4,5"), ("cuda:0", ""), ("npu:x", ""), ("", "")])
def test_a_device_that_is_not_there_is_refused(device: str, visible: str) -> None:
    with pytest.raises(EngineError) as caught:
        device_number(device, {"ASCEND_RT_VISIBLE_DEVICES": visible})
    assert caught.value.operation == "open"


# -- the newest generation -------------------------------------------------------------------------------------------


class Newest(Native):
    port: ClassVar[Any] = 41234
    route: ClassVar[Any] = "roce"

    def get_rpc_port(self) -> Any:
        return Newest.port

    def get_route_policy(self) -> Any:
        return Newest.route


@pytest.fixture
def newest(engine: YuanRongEngine, monkeypatch: pytest.MonkeyPatch) -> YuanRongEngine:
    monkeypatch.setattr(yuanrong, "load_binding", lambda: Binding(Newest, True, True))
    return engine


def test_the_newest_generation_chooses_its_port(newest: YuanRongEngine) -> None:
    newest.open(CONFIG)
    assert Native.made[0].called("initialize")[0][0] == "127.0.0.1:0"
    assert newest.endpoint == "127.0.0.1:41234"


def test_an_engine_that_rejects_port_0_is_given_one(newest: YuanRongEngine) -> None:
    Native.script = {"initialize": [Answer(2, "port 0 is invalid")]}
    newest.open(CONFIG)
    (tried,) = Native.made[1].called("initialize")
    assert newest.endpoint == tried[0] != "127.0.0.1:0"


@pytest.mark.parametrize("port", [0, -1, 65536, None, "7000"])
def test_a_port_that_cannot_be_one_is_an_error(
    newest: YuanRongEngine, monkeypatch: pytest.MonkeyPatch, port: Any
) -> None:
    monkeypatch.setattr(Newest, "port", port)
    with pytest.raises(EngineError, match="reports port"):
        newest.open(CONFIG)


@pytest.mark.parametrize("member", ["get_rpc_port", "get_route_policy"])
def test_an_engine_that_listens_is_ended_if_opening_fails_after_that(
    newest: YuanRongEngine, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    def fails(self: Newest) -> None:
        raise RuntimeError("the wheel's own")

    with monkeypatch.context() as changed:
        changed.setattr(Newest, member, fails)
        with pytest.raises(EngineError, match="the wheel's own"):
            newest.open(CONFIG)
    assert len(Native.made[0].called("finalize")) == 1
    destroyed = only_native()
    gc.collect()
    assert destroyed() is None
    newest.open(CONFIG)


@pytest.mark.parametrize(
    ("route", "refused"), [("auto", True), (SimpleNamespace(name="HCCS"), True), ("roce", False), ("later", False)]
)
def test_regions_are_aligned_where_the_route_requires_it(
    newest: YuanRongEngine, monkeypatch: pytest.MonkeyPatch, route: Any, refused: bool
) -> None:
    monkeypatch.setattr(Newest, "route", route)
    newest.open(CONFIG)
    newest.register([Region(4 << 20, 100)])
    if refused:
        with pytest.raises(EngineError, match=r"YR_TE_HIXL_ROUTE=(auto|hccs)") as caught:
            newest.register(REGIONS)
        assert (caught.value.operation, caught.value.side) == ("register", "receiver")
        assert newest.registered_nbytes == 100
    else:
        newest.register(REGIONS)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_registration_is_one_call_and_leaves_nothing_behind_when_refused(engine: YuanRongEngine) -> None:
    engine.open(CONFIG)
    Native.script = {"register": [Answer(2, "failed to add registered region")]}
    with pytest.raises(EngineError, match="kInvalid"):
        engine.register(REGIONS)
    assert engine.registered_nbytes == 0
    engine.register(REGIONS)
    assert Native.made[0].called("register")[-1] == ([0x1000, 0x2000, 0x3000], [100, 100, 100])


def test_hixl_refuses_under_a_read_and_is_asked_again(engine: YuanRongEngine) -> None:
    engine.open(CONFIG)
    engine.register(REGIONS)
    Native.script = {"finalize": [Answer(8, "a peer reads")] * 2}
    engine.close()
    assert len(Native.made[0].called("finalize")) == 3


def test_an_engine_that_cannot_be_finalized_keeps_its_memory(engine: YuanRongEngine) -> None:
    engine.open(CONFIG)
    Native.script = {"finalize": [RuntimeError("C++")]}
    native = only_native()
    with pytest.raises(EngineError) as caught:
        engine.close()
    assert caught.value.in_flight
    assert native() is not None


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_read_goes_to_the_relay_as_three_lists(engine: YuanRongEngine, peer: str) -> None:
    reading(engine, peer)
    engine.read(peer, segments(2), 5.0)
    target, local, remote, lengths = Native.made[0].called("read")[0]
    assert (local, remote, lengths) == ([0x1000, 0x2000], [0x9000, 0x9001], [10, 10])
    assert target != peer
    assert target.startswith("127.0.0.1:")


@pytest.mark.parametrize("hixl", [True], indirect=True)
def test_the_generation_that_bounds_its_calls_is_told_the_peer_itself(engine: YuanRongEngine, peer: str) -> None:
    reading(engine, peer)
    engine.read(peer, segments(2), 5.0)
    assert Native.made[0].called("read")[0][0] == peer


@pytest.mark.parametrize("operation", ["register", "read"])
def test_the_thread_that_calls_gets_a_context_first(engine: YuanRongEngine, peer: str, operation: str) -> None:
    """A fork bounds native calls by threads of their own, and the runtime counts contexts by thread."""
    engine.open(EngineConfig(device="npu:0", timeout_s=5.0))
    if operation == "read":
        engine.register(REGIONS)
        engine.connect(peer, 5.0)
    calls = {"register": lambda: engine.register(REGIONS), "read": lambda: engine.read(peer, segments(1), 5.0)}
    thread = threading.Thread(target=calls[operation])
    thread.start()
    thread.join(60)
    assert isinstance(engine._acl, Acl)
    assert engine._acl.threads[-1] == (thread.ident, 0)


@pytest.mark.parametrize(
    ("code", "count", "in_flight"),
    [(2, 3, False), (9, 1, False), (9, 2, True), (5, 1, True), (3, 1, True), (36, 1, True)],
)
def test_what_a_failed_read_says_about_the_memory(
    engine: YuanRongEngine, peer: str, code: int, count: int, in_flight: bool
) -> None:
    reading(engine, peer)
    Native.script = {"read": [Answer(code, "it failed")]}
    with pytest.raises(EngineError, match="it failed") as caught:
        engine.read(peer, segments(count), 5.0)
    assert caught.value.in_flight is in_flight
    if in_flight:
        with pytest.raises(EngineError, match="close the engine"):
            engine.connect(peer, 5.0)
        native = only_native()
        engine.close()
        assert native() is None, "close gives the buffers back by destroying the engine, whoever holds the error"
    else:
        engine.read(peer, segments(count), 5.0)


def test_a_read_that_waited_in_vain_keeps_the_native_engine_for_good(engine: YuanRongEngine, peer: str) -> None:
    """Its destructor would wait as well, with the GIL held, and nobody knows for how long."""
    engine.open(EngineConfig(device="npu:0", timeout_s=5.0, options={"receive_wait_s": "0"}))
    engine.register(REGIONS)
    engine.connect(peer, 5.0)
    Native.script = {"read": [Answer(5, "wait timed out")]}
    with pytest.raises(EngineError) as caught:
        engine.read(peer, segments(1), 5.0)
    assert caught.value.in_flight
    native = only_native()
    with pytest.raises(EngineError, match="may still arrive") as caught:
        engine.close()
    assert caught.value.in_flight
    assert caught.value.operation == "close"
    assert native() is not None
    assert engine.registered_nbytes == 0


def test_a_seed_that_is_not_ready_is_asked_again_and_not_for_ever(engine: YuanRongEngine, peer: str) -> None:
    reading(engine, peer)
    Native.script = {"read": [Answer(8, "not yet"), Answer(8, "not yet")]}
    engine.read(peer, segments(2), 5.0)
    Native.script = {"read": [Answer(8, "not yet")] * 100}
    with pytest.raises(EngineError) as caught:
        engine.read(peer, segments(2), 5.0)
    assert (caught.value.code, caught.value.in_flight) == ("kNotReady", False)
    assert len(Native.made[0].called("read")) == 3 + 3


@pytest.mark.parametrize("hixl", [True], indirect=True)
def test_with_hixl_not_ready_may_come_in_the_middle_of_a_read(engine: YuanRongEngine, peer: str) -> None:
    reading(engine, peer)
    Native.script = {"read": [Answer(8, "unregistered meanwhile")] * 100}
    with pytest.raises(EngineError) as caught:
        engine.read(peer, segments(1), 5.0)
    assert caught.value.in_flight


# -- reaching a peer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", ":1", "host", "host:", "host:0", "host:65536", "a:b:1", "host:１", "host:-1"])
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        parse_endpoint(text)
    assert caught.value.operation == "connect"


def test_the_installed_bases_endpoint_is_understood() -> None:
    assert parse_endpoint("10.0.0.7:40001") == ("10.0.0.7", 40001)


def test_a_peer_that_accepts_and_never_answers_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(EngineError, match="no engine answers") as caught:
            probe(listener.getsockname(), 0.1, "connect", converse=True)
        assert (caught.value.code, caught.value.retry_elsewhere) == ("timeout", True)
        probe(listener.getsockname(), 5.0, "connect", converse=False)


# -- the runtime -----------------------------------------------------------------------------------------------------


class Library:
    """``libascendcl`` as far as the adapter calls it."""

    def __init__(self, has: int | None, set_code: int = 0) -> None:
        self.has, self.set_code, self.chosen = has, set_code, -1

    def aclrtGetCurrentContext(self, context: Any) -> int:
        ctypes.cast(context, ctypes.POINTER(ctypes.c_void_p))[0] = self.has
        return 0 if self.has else 107002

    def aclrtSetDevice(self, device: ctypes.c_int32) -> int:
        self.chosen = device.value
        return self.set_code


@pytest.mark.parametrize(("has", "chosen"), [(None, 3), (0x1234, -1)])
def test_a_context_is_made_only_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, has: int | None, chosen: int
) -> None:
    library = Library(has)
    monkeypatch.setattr(yuanrong_native.ctypes, "CDLL", lambda _: library)
    AclRuntime().ensure_context(3)
    assert library.chosen == chosen


def test_a_runtime_that_gives_no_context_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yuanrong_native.ctypes, "CDLL", lambda _: Library(None, set_code=507033))
    with pytest.raises(EngineError, match="507033"):
        AclRuntime().ensure_context(0)


def test_a_missing_runtime_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_library, "ASCEND_RUNTIME", "libascendcl-that-is-not-there.so")
    with pytest.raises(EngineUnavailable, match=r"set_env\.sh"):
        AclRuntime()
