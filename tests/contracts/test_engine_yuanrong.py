"""Every YuanRong generation keeps the port's contract.

Both wheels do, unmodified, on the host stand-in for the Ascend data plane; the newest generation is stood in for whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from tests.contracts.driver_buffer import ROOT
from tests.standin import build, wheels
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.yuanrong.native import CODES
from vllm_rfork.errors import EngineError
from vllm_rfork.testing import MIB, PAGE, EngineContract, Processes, WorkerProcess, pattern
from vllm_rfork.testing.engine_worker import as_json

NEWEST = ROOT / "tests" / "standin" / "newest"
#: What the engine's wait of 10 s becomes in the tests that let it run out.
WAIT_S = 1.0
#: The engine's wait and the adapter's own steps around it.
BOUND_S = 10 * WAIT_S

_SHOW_CODES = """
import json, yr.datasystem as m
codes = getattr(m, "StatusCode", None) or m.ErrorCode
print(json.dumps({int(code): name for name, code in codes.__members__.items()}))
"""


class AnyGeneration(EngineContract):
    """What the engine does differently in every generation."""

    engine: ClassVar[str] = "yuanrong"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.yuanrong.engine",)
    #: Two control calls in a row, each of them reset after 10 s, where the peer stops between the probe and the read.
    dead_peer_s: ClassVar[float] = 25.0
    close_may_keep_memory: ClassVar[bool] = True

    def check_refused_batch(
        self, error: EngineError, receiver: WorkerProcess, target: int, *, local_is_bad: bool
    ) -> None:
        """The seed's engine authorizes item by item: items before a bad one may be written, and are in flight."""
        self.check(error, "read")
        assert error.in_flight is not local_is_bad
        receiver.close()
        got = receiver.peek(target, 0, 8 * PAGE)
        first = got[PAGE : PAGE + 16]
        assert first == bytes(16) or (not local_is_bad and first == pattern(7, 8 * PAGE)[PAGE : PAGE + 16])
        assert got[:PAGE] + got[PAGE + 16 :] == bytes(8 * PAGE - 16)


class YuanRongContract(AnyGeneration):
    """Everything that the two wheels have in common; ``wheel`` names one in ``tests/standin/wheels.py``."""

    wheel: ClassVar[str]
    installed: ClassVar[wheels.Installed]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _standin_and_wheel(cls) -> None:
        build.build()
        cls.installed = wheels.installed(cls.wheel)

    @pytest.fixture(autouse=True)
    def _no_faults(self) -> None:
        self.faults: dict[str, object] = {}

    def read_after_refusal(self, receiver: WorkerProcess, endpoint: str, target: int, source: int, nbytes: int) -> None:
        """The seed may still answer on the connection of the refused read: an error, and the engine is opened again."""
        try:
            super().read_after_refusal(receiver, endpoint, target, source, nbytes)
        except EngineError as error:
            if error.code != "kRuntimeError" or not error.in_flight:
                raise
            with contextlib.suppress(EngineError):  # it may keep the memory for good
                receiver.close()
            receiver.call("open", config=as_json(self.config()))
            receiver.register([target, nbytes])
            receiver.connect(endpoint)
            receiver.read(endpoint, [[target, source, nbytes]])

    def python(self) -> str:
        return self.installed.python

    def environment(self) -> Mapping[str, str]:
        path = ":".join(filter(None, [str(ROOT), self.installed.environment.get("PYTHONPATH", "")]))
        return {**build.environment(**self.faults), "PYTHONPATH": path}

    def config(self) -> EngineConfig:
        options = {"receive_wait_s": str(WAIT_S)} if "wait_scale" in self.faults else {}
        return EngineConfig(device="cpu", host="127.0.0.1", timeout_s=20.0, options=options)

    def start_with(self, processes: Processes, **faults: object) -> WorkerProcess:
        self.faults = faults
        worker = processes.start()
        self.faults = {}
        return worker

    def pair_with(
        self,
        processes: Processes,
        nbytes: int,
        seed_faults: Mapping[str, object],
        receiver_faults: Mapping[str, object],
    ) -> tuple[WorkerProcess, WorkerProcess, int, int, str]:
        """As ``seed_and_receiver``, with faults on either side."""
        seed, receiver = self.start_with(processes, **seed_faults), self.start_with(processes, **receiver_faults)
        return self.connected(seed, receiver, nbytes)

    # -- faults of the data plane ------------------------------------------------------------------------------------

    @pytest.mark.parametrize("lane", ["memory", "wire"])
    def test_a_flipped_byte_arrives_as_such_and_nothing_else_differs(self, processes: Processes, lane: str) -> None:
        """The engine does not notice; digests have to."""
        faults, ours = {"flip_nbyte": 70_001}, {"lane": lane}
        _, receiver, source, target, endpoint = self.pair_with(processes, MIB, faults, ours)
        receiver.read(endpoint, [[target, source, PAGE], [target + PAGE, source + PAGE, MIB - PAGE]])
        expected, got = pattern(7, MIB), receiver.peek(target, 0, MIB)
        assert [i for i in range(MIB) if got[i] != expected[i]] == [70_001]

    @pytest.mark.parametrize("lane", ["memory", "wire"])
    def test_a_cut_connection_is_an_error_and_its_buffers_come_back(self, processes: Processes, lane: str) -> None:
        nbytes = 4 * MIB
        faults, ours = {"cut_after_nbytes": 3 * MIB}, {"lane": lane}
        seed, receiver, source, target, endpoint = self.pair_with(processes, nbytes, faults, ours)
        segments = [[target + i * MIB, source + i * MIB, MIB] for i in range(4)]
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, segments)
        self.check(caught.value, "read")
        assert caught.value.in_flight
        assert receiver.elapsed_s < BOUND_S
        with pytest.raises(EngineError, match="close the engine"):
            receiver.read(endpoint, segments)
        receiver.close()
        got = receiver.peek(target, 0, nbytes)
        assert got == pattern(7, nbytes)[: 3 * MIB] + bytes(MIB)
        assert seed.call("ping") == "pong"
        self.still_good(processes, receiver, target, nbytes, closed=True)

    def test_a_refusal_is_an_error_with_nothing_written(self, processes: Processes) -> None:
        _, receiver, source, target, endpoint = self.pair_with(processes, MIB, {"refuse": 1}, {})
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, source, MIB]])
        self.check(caught.value, "read", in_flight=False)
        assert caught.value.code == "kNotReady"
        assert caught.value.retry_elsewhere
        assert receiver.elapsed_s < BOUND_S
        assert receiver.peek(target, 0, MIB) == bytes(MIB)
        self.still_good(processes, receiver, target, MIB)

    def test_a_short_stall_is_waited_for(self, processes: Processes) -> None:
        faults = {"stall_s": 0.3, "stall_at_nbyte": MIB // 2}
        seed, receiver, source, target, endpoint = self.pair_with(processes, MIB, faults, {})
        receiver.read(endpoint, [[target, source, MIB]])
        assert receiver.elapsed_s > 0.3
        assert receiver.digest(target) == seed.digest(source)

    def test_a_long_stall_is_a_bounded_error_and_its_buffers_stay_with_the_wire(self, processes: Processes) -> None:
        """The engine's own wait for an item runs out, however long the caller would have waited."""
        _, receiver, source, target, endpoint = self.pair_with(
            processes, MIB, {"stall_s": 60, "stall_at_nbyte": MIB // 2}, {"wait_scale": WAIT_S / 10}
        )
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, source, MIB]], timeout_s=60.0)
        self.check(caught.value, "read")
        assert caught.value.in_flight
        assert receiver.elapsed_s < BOUND_S
        with pytest.raises(EngineError) as caught:
            receiver.close()
        self.check(caught.value, "close")
        assert caught.value.in_flight
        assert receiver.elapsed_s < BOUND_S
        assert receiver.registered_nbytes == 0
        receiver.close()  # idempotent: it was said once

    def test_late_bytes_land_after_the_error_and_the_adapter_had_said_so(self, processes: Processes) -> None:
        """What the kept buffers are kept for: the device fills them after everybody has given up."""
        late = {"late_s": 3 * WAIT_S, "wait_scale": WAIT_S / 10}
        _, receiver, source, target, endpoint = self.pair_with(processes, PAGE, {}, late)
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, source, PAGE]], timeout_s=60.0)
        assert caught.value.in_flight
        with pytest.raises(EngineError) as caught:
            receiver.close()
        assert caught.value.in_flight
        assert receiver.peek(target, 0, PAGE) == bytes(PAGE)
        wait_until(lambda: receiver.peek(target, 0, PAGE) == pattern(7, PAGE))

    # -- faults of the control plane ---------------------------------------------------------------------------------

    def test_a_peer_that_answers_once_and_then_never_cannot_hold_a_read(self, processes: Processes) -> None:
        """The installed engines wait for a control answer without limit; the relay ends that."""
        receiver = processes.start()
        target = receiver.alloc(PAGE)
        receiver.register([target, PAGE])
        with silent_after(2) as endpoint:  # the probe of connect and that of read get their answers
            receiver.connect(endpoint, timeout_s=1.0)
            with pytest.raises(EngineError) as caught:
                receiver.read(endpoint, [[target, PAGE, PAGE]], timeout_s=1.0)
        self.check(caught.value, "read")
        assert receiver.elapsed_s < BOUND_S
        self.still_good_after_giving_up(processes, receiver, target)

    def still_good_after_giving_up(self, processes: Processes, receiver: WorkerProcess, target: int) -> None:
        with contextlib.suppress(EngineError):
            receiver.close()
        receiver.call("free", address=target)
        other = receiver.alloc(PAGE)
        receiver.open()
        receiver.register([other, PAGE])
        self.still_good(processes, receiver, other, PAGE)

    def test_a_stranger_on_the_port_is_told_from_an_engine(self, processes: Processes) -> None:
        receiver = processes.start()
        with (
            silent_after(1, answer=b"HTTP/1.1 400 Bad Request\r\n\r\n") as endpoint,
            pytest.raises(EngineError, match="is not a YuanRong engine") as caught,
        ):
            receiver.connect(endpoint, timeout_s=5.0)
        self.check(caught.value, "connect")

    def test_no_process_is_left_behind(self, processes: Processes) -> None:
        seed, receiver, _, _, endpoint = self.seed_and_receiver(processes, PAGE)
        assert len(children(receiver.process.pid)) == 1, "the relay"
        receiver.connect(endpoint)
        assert len(children(receiver.process.pid)) == 1, "connecting again must not leave the first relay"
        receiver.disconnect(endpoint)
        assert children(receiver.process.pid) == []
        receiver.connect(endpoint)
        receiver.close()
        assert children(receiver.process.pid) == []
        assert children(seed.process.pid) == []

    def test_the_relay_ends_with_its_process(self, processes: Processes) -> None:
        _, receiver, _, _, _ = self.seed_and_receiver(processes, PAGE)
        (relay,) = children(receiver.process.pid)
        receiver.signal(signal.SIGKILL)
        receiver.process.wait(60)
        wait_until(lambda: not Path(f"/proc/{relay}").exists() or state(relay) == "Z")

    # -- the wheel ----------------------------------------------------------------------------------------------------

    def test_the_map_of_codes_is_complete(self) -> None:
        environment = {**os.environ, **self.environment()}
        shown = subprocess.run(
            [self.python(), "-c", _SHOW_CODES], env=environment, capture_output=True, text=True, timeout=240, check=True
        )
        assert {int(code): name for code, name in json.loads(shown.stdout).items()} == CODES


class TestTransferEngineWheel(YuanRongContract):
    wheel: ClassVar[str] = "transfer-engine"


class TestDatasystemWheel(YuanRongContract):
    wheel: ClassVar[str] = "datasystem"


class TestNewestGeneration(AnyGeneration):
    """The stand-in of ``tests/standin/newest``: the adapter recognizes the generation by its members."""

    silent_peer_in_flight: ClassVar[bool] = True

    @pytest.fixture(autouse=True)
    def _variables(self) -> None:
        build.build()
        self.variables: dict[str, str] = {}

    def environment(self) -> Mapping[str, str]:
        return {**build.environment(), "PYTHONPATH": f"{ROOT}:{NEWEST}", **self.variables}

    def test_the_engine_chooses_its_port_in_the_range_that_the_user_gave(self, processes: Processes) -> None:
        """It holds that port while it chooses, so two workers never race for one."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            least = taken.getsockname()[1]
            self.variables = {"YR_TE_RPC_PORT_MIN": str(least), "YR_TE_RPC_PORT_MAX": str(least + 9)}
            ports = []
            for worker in processes.two():
                address = worker.alloc(PAGE)
                worker.register([address, PAGE])
                ports.append(int(worker.endpoint().rpartition(":")[2]))
        assert len({*ports, least}) == 3
        assert all(least < port < least + 10 for port in ports)

    def test_no_relay_stands_between_a_receiver_and_its_seed(self, processes: Processes) -> None:
        _, receiver, _, _, _ = self.seed_and_receiver(processes, PAGE)
        assert children(receiver.process.pid) == []

    @pytest.mark.parametrize("route", ["auto", "hccs"])
    def test_a_base_that_the_route_does_not_accept_is_refused_with_the_reason(
        self, processes: Processes, route: str
    ) -> None:
        self.variables = {"YR_TE_HIXL_ROUTE": route}
        seed = processes.start()
        memory = seed.alloc(4 * MIB, seed=7)
        aligned = -(-memory // (2 * MIB)) * 2 * MIB
        with pytest.raises(EngineError, match=f"route {route} requires.*YR_TE_HIXL_ROUTE=roce") as caught:
            seed.register([aligned + PAGE, PAGE])
        self.check(caught.value, "register", in_flight=False)
        assert seed.registered_nbytes == 0
        seed.register([aligned, PAGE])


def wait_until(condition: Callable[[], bool], deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def silent_after(answered: int, answer: bytes = b"TERP\x02\0\0\0\x0b\0\0\0\0\0\0\0\x02ok\0") -> Iterator[str]:
    """A port that answers ``answered`` connections and keeps the others waiting."""
    kept: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                if len(kept) < answered:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                kept.append(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)
    for connection in kept:
        connection.close()
