"""CUDA IPC keeps the port's contract on the host stand-in for the CUDA driver, and says why where it cannot work.

``RFORK_TEST_GPU=1`` runs the same on a real driver and GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from tests.contracts.driver_buffer import ROOT
from tests.standin import build
from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.cuda_ipc.endpoint import decode
from vllm_rfork.errors import EngineError
from vllm_rfork.testing import MIB, PAGE, EngineContract, Processes

ON_GPU = os.environ.get("RFORK_TEST_GPU") == "1"


class TestCudaIpcEngine(EngineContract):
    engine: ClassVar[str] = "cuda_ipc"
    device: ClassVar[str] = "cuda:0"
    buffer: ClassVar[str] = "tests.contracts.driver_buffer:DriverBuffer"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.cuda_ipc.engine",)
    memory_outlives_its_process: ClassVar[bool] = True
    faults: ClassVar[Mapping[str, object]] = {}

    def environment(self) -> Mapping[str, str]:
        return {} if ON_GPU else build.cuda_environment(build.build(), **self.faults)

    def test_tensors_of_one_allocation_share_a_handle(self, processes: Processes) -> None:
        seed = processes.start()
        one, other = seed.alloc(8 * PAGE, seed=7), seed.alloc(PAGE)
        seed.register(*[[one + number * PAGE, 100] for number in range(8)], [other, PAGE])
        endpoint = decode(seed.endpoint())
        assert [each.base for each in endpoint.allocations] == sorted([one, other])
        assert len(endpoint.regions) == 9

    def test_memory_that_is_no_allocation_is_refused(self, processes: Processes) -> None:
        seed = processes.start()
        address = seed.alloc(PAGE)
        for region in ([address, PAGE + 1], [PAGE, 10]):
            with pytest.raises(EngineError) as caught:
                seed.register(region)
            self.check(caught.value, "register")
        assert seed.registered_nbytes == 0

    def test_a_seed_on_another_host_is_refused(self, processes: Processes) -> None:
        _, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        elsewhere = json.dumps({**json.loads(endpoint), "boot": "another kernel"})
        with pytest.raises(EngineError, match="another host") as caught:
            receiver.connect(elsewhere)
        self.check(caught.value, "connect", in_flight=False)
        assert caught.value.retry_elsewhere
        receiver.read(endpoint, [[target, source, PAGE]])

    def test_a_seed_that_closes_is_noticed_though_its_memory_is_mapped(self, processes: Processes) -> None:
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        receiver.read(endpoint, [[target, source, PAGE]])
        seed.close()
        with pytest.raises(EngineError, match="has closed") as caught:
            receiver.read(endpoint, [[target, source, PAGE]])
        assert not caught.value.in_flight

    def test_a_seed_that_closes_in_the_middle_of_reads_ends_them(self, processes: Processes) -> None:
        """As a seed does that is suspended: the read that was under way is not accepted, whatever it copied."""
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, self.large_nbytes)
        segments = [[target, source, self.large_nbytes]]
        receiver.send("read_loop", endpoint=endpoint, segments=segments, timeout_s=10.0, seconds=60.0)
        assert receiver.message(60.0) == {"event": "reading"}
        seed.close()
        with pytest.raises(EngineError, match="has closed") as caught:
            receiver.result(self.dead_peer_s)
        self.check(caught.value, "read", in_flight=False)
        assert caught.value.side == "seed"
        self.still_good(processes, receiver, target, self.large_nbytes)

    def test_endpoints_that_contradict_themselves_are_refused(self, processes: Processes) -> None:
        """No address of a lying seed gets as far as the driver's copies."""
        _, receiver, source, target, endpoint = self.seed_and_receiver(processes, 2 * PAGE)
        for lie in lies(json.loads(endpoint)):
            with pytest.raises(EngineError) as caught:
                receiver.connect(json.dumps(lie))
            self.check(caught.value, "connect", in_flight=False)
        receiver.read(endpoint, [[target, source, PAGE]])

    def test_an_allocation_that_is_shorter_than_the_endpoint_says_is_refused(self, processes: Processes) -> None:
        """Before anything is written: a copy beyond its end would fail in the middle of a read."""
        _, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        true = json.loads(endpoint)
        base, nbytes, handle = true["allocations"][0]
        longer = nbytes + 64 * MIB
        lie = json.dumps({**true, "allocations": [[base, longer, handle]], "regions": [[base, longer]]})
        with pytest.raises(EngineError, match="its endpoint says") as caught:
            receiver.connect(lie)
        self.check(caught.value, "connect", in_flight=False)
        assert caught.value.retry_elsewhere
        receiver.read(endpoint, [[target, source, PAGE]])

    def test_two_engines_of_one_process_may_read_the_same_seed(self, processes: Processes) -> None:
        """Target and draft do; the driver counts how often a handle is open."""
        seed, receiver, source, target, endpoint = self.seed_and_receiver(processes, PAGE)
        receiver.connect(endpoint)
        receiver.read(endpoint, [[target, source, PAGE]])
        assert receiver.digest(target) == seed.digest(source)


def lies(true: dict[str, Any]) -> list[dict[str, Any]]:
    """Endpoints that no seed produces, each false in one respect."""
    (base, nbytes, handle), (region, length) = true["allocations"][0], true["regions"][0]
    short = handle[:40]
    return [
        {**true, "v": 2},
        {**true, "identity": short},
        {**true, "device": short},
        {**true, "page": [1, 1, handle]},
        {**true, "page": [base, nbytes, short]},
        {**true, "allocations": [[base, nbytes, short]]},
        {**true, "allocations": []},
        {**true, "allocations": [[base, nbytes, handle], [base + PAGE, nbytes, handle]]},
        {**true, "allocations": [[base, nbytes - 1, handle]]},
        {**true, "allocations": [[base + 1, nbytes, handle]]},
        {**true, "regions": [[region, nbytes + 1]]},
        {**true, "regions": [[region, 0]]},
        {**true, "regions": [[-region, length]]},
        {**true, "regions": [[region, length], [region, length]]},
        {**true, "regions": [[2**70, length]]},
        {**true, "identity": "AAAAAAAAAAAAAAAAAAAAAA=="},
    ]


@pytest.mark.skipif(ON_GPU, reason="a real driver takes no faults; the stand-in, which CI runs, does")
class TestFaults:
    """What the stand-in can be told to do."""

    def suite(self, **faults: object) -> EngineContract:
        suite = TestCudaIpcEngine()
        suite.config = lambda: EngineConfig(device="cuda:0", timeout_s=2.0)  # type: ignore[method-assign]
        suite.faults = faults  # type: ignore[misc]
        return suite

    def test_memory_that_the_driver_does_not_export_is_named(self) -> None:
        suite = self.suite(no_export=1)
        processes = Processes(suite)
        try:
            seed = processes.start()
            address = seed.alloc(MIB)
            with pytest.raises(EngineError, match="expandable segments") as caught:
                seed.register([address, MIB])
            suite.check(caught.value, "register")
            assert seed.registered_nbytes == 0
        finally:
            processes.end()

    def test_a_gpu_that_cannot_be_opened_sends_to_another_seed(self) -> None:
        suite = self.suite(no_open=1)
        processes = Processes(suite)
        try:
            with pytest.raises(EngineError, match="no access to the seed's GPU") as caught:
                suite.seed_and_receiver(processes, PAGE)
            suite.check(caught.value, "connect", in_flight=False)
            assert caught.value.code == "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"
            assert caught.value.retry_elsewhere
        finally:
            processes.end()

    def test_memory_that_the_driver_does_not_copy_in_batches_is_copied_one_by_one(self) -> None:
        suite = self.suite(no_batch=1)
        processes = Processes(suite)
        try:
            seed, receiver, source, target, endpoint = suite.seed_and_receiver(processes, 64 * PAGE)
            pages = [[target + number * PAGE, source + (63 - number) * PAGE, PAGE] for number in range(64)]
            for _ in range(2):  # the refusal, and the reads after it
                receiver.call("fill", address=target, seed=9)
                receiver.read(endpoint, pages)
                assert receiver.peek(target, 0, PAGE) == seed.peek(source, 63 * PAGE, PAGE)
                assert receiver.peek(target, 63 * PAGE, PAGE) == seed.peek(source, 0, PAGE)
        finally:
            processes.end()

    def test_copies_that_never_end_are_given_up_in_time_and_the_memory_is_kept(self) -> None:
        suite = self.suite(stall=1)
        processes = Processes(suite)
        try:
            _, receiver, source, target, endpoint = suite.seed_and_receiver(processes, MIB)
            with pytest.raises(EngineError) as caught:
                receiver.read(endpoint, [[target, source, MIB]], timeout_s=0.3)
            assert caught.value.in_flight
            for call in (
                lambda: receiver.read(endpoint, [[target, source, PAGE]]),
                lambda: receiver.connect(endpoint),
                receiver.endpoint,
            ):
                with pytest.raises(EngineError, match="given up") as caught:
                    call()
                assert caught.value.in_flight
            receiver.disconnect(endpoint)
            with pytest.raises(EngineError) as caught:
                receiver.call("close", deadline_s=60.0)
            assert (caught.value.operation, caught.value.in_flight) == ("close", True)
        finally:
            processes.end()


def test_without_a_driver_the_engine_says_so() -> None:
    text = (
        "from vllm_rfork.engines.base import EngineConfig\n"
        "from vllm_rfork.engines.cuda_ipc import driver, engine\n"
        "driver.CUDA_DRIVER = 'libcuda-that-is-not-there.so.1'\n"
        "engine.CudaIpcEngine().open(EngineConfig(device='cuda:0'))\n"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, timeout=240, check=False, capture_output=True)
    assert b"EngineUnavailable" in done.stderr
    assert b"NVIDIA driver" in done.stderr
