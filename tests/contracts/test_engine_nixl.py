"""NIXL keeps the port's contract on the lane it chooses, refuses the one that can crash a seed, and idles for free."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
import pytest

from tests.contracts.driver_buffer import ROOT
from vllm_rfork.engines.nixl.peer import decode_endpoint, encode_endpoint
from vllm_rfork.errors import EngineError
from vllm_rfork.testing import MIB, PAGE, EngineContract, Processes, WorkerGone, WorkerProcess


def changed(endpoint: str, **fields: Any) -> str:
    """``endpoint`` as a process with other ``fields`` would have written it, its checksum included."""
    return encode_endpoint(msgspec.structs.replace(decode_endpoint(endpoint), **fields))


class TestNixlEngine(EngineContract):
    """Host memory on one machine: cross-memory attach."""

    engine: ClassVar[str] = "nixl"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.nixl.engine",)

    def test_an_idle_engine_burns_no_core(self, processes: Processes) -> None:
        """A seed that was read from, and its receiver; NIXL's own default takes 0.93 of a core each."""
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        receiver.read(endpoint, [[target, source, MIB]])
        for worker in (seed, receiver):
            assert worker.call("cpu_s", seconds=2.0) < 2.0 * 0.1

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            ("pid_namespace", 1, "pid namespace"),
            ("uid", 987654, "another user"),
            ("boot", "another machine's", "RDMA"),
        ],
    )
    def test_a_seed_that_only_tcp_reaches_is_refused(
        self, processes: Processes, field: str, value: object, reason: str
    ) -> None:
        """The refusal names the transport, the reason and the way to take it all the same."""
        _, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        elsewhere = changed(endpoint, **{field: value})
        with pytest.raises(EngineError, match=reason) as caught:
            receiver.connect(elsewhere)
        self.check(caught.value, "connect", in_flight=False)
        assert "TCP" in caught.value.text
        assert "RFORK_NIXL_ALLOW_TCP=1" in caught.value.text
        receiver.read(endpoint, [[target, source, PAGE]])

    def test_an_opt_in_of_the_receiver_alone_is_not_enough(self, processes: Processes) -> None:
        seed = processes.start()
        source = seed.alloc(PAGE, seed=7)
        seed.register([source, PAGE])
        endpoint = changed(seed.endpoint(), uid=987654)
        assert json.loads(endpoint)["allow_tcp"] is False
        receiver = processes.start(opened=False)
        receiver.call("new", name=self.engine)
        options = {"RFORK_NIXL_ALLOW_TCP": "1"}
        receiver.call("open", config={"device": "cpu", "host": "127.0.0.1", "timeout_s": 20.0, "options": options})
        with pytest.raises(EngineError, match="TCP"):
            receiver.connect(endpoint)

    def test_leaving_without_close_is_no_crash(self) -> None:
        """A worker that ends on an error never gets to close its engine."""
        text = (
            "from vllm_rfork.engines.base import EngineConfig\n"
            "from vllm_rfork.engines.nixl.engine import NixlEngine\n"
            "engine = NixlEngine()\n"
            "engine.open(EngineConfig(device='cpu'))\n"
        )
        done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, timeout=240, check=False, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()


class WithoutAttach(EngineContract):
    """Both processes could attach, but UCX was told to use nothing that can."""

    engine: ClassVar[str] = "nixl"

    def environment(self) -> Mapping[str, str]:
        return {"UCX_TLS": "tcp,posix,sysv,self"}


def test_ucx_cannot_fall_back_to_an_emulated_lane() -> None:
    suite = WithoutAttach()
    processes = Processes(suite)
    try:
        with pytest.raises(EngineError, match="RFORK_NIXL_ALLOW_TCP") as caught:
            suite.seed_and_receiver(processes, PAGE)
        suite.check(caught.value, "connect", in_flight=False)
    finally:
        processes.end()


class TestNixlOverTcp(EngineContract):
    """What the opt-in gives: everything but the seed's safety from a receiver that dies or gives a read up."""

    engine: ClassVar[str] = "nixl"
    #: No forks: ``fence`` needs the exit status of a seed.
    preload: ClassVar[tuple[str, ...]] = ()
    large_nbytes: ClassVar[int] = 32 * MIB

    #: The reason for the opt-in: over TCP this can crash the seed, so there is nothing to promise.
    test_a_receiver_killed_in_the_middle_of_a_read_leaves_its_seed_alive = None  # type: ignore[assignment]

    def environment(self) -> Mapping[str, str]:
        return {"UCX_TLS": "tcp", "RFORK_NIXL_ALLOW_TCP": "1"}

    def fence(self, processes: Processes, seed: WorkerProcess, source: int, nbytes: int) -> None:
        """The seed may die of the read that was given up; a dead seed owes nothing either."""
        try:
            super().fence(processes, seed, source, nbytes)
        except (WorkerGone, EngineError):
            assert seed.process.wait(60) < 0

    def test_a_read_given_up_leaves_only_close(self, processes: Processes) -> None:
        """A stopped seed answers nothing over TCP: an error in time, marked in flight, and no other call after it."""
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, MIB)
        receiver.read(endpoint, [[target, source, MIB]])
        seed.signal(signal.SIGSTOP)
        with pytest.raises(EngineError) as caught:
            receiver.read(endpoint, [[target, source, MIB]], timeout_s=1.0)
        assert caught.value.in_flight
        with pytest.raises(EngineError, match="given up") as caught:
            receiver.read(endpoint, [[target, source, MIB]], timeout_s=1.0)
        assert caught.value.in_flight
        receiver.disconnect(endpoint)
        self.nothing_arrives_after_close(processes, seed, receiver, source, target, MIB)
