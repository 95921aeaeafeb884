"""Receivers that die or stop in the middle of a read cost the seed their own groups, and nothing else.

Over TCP, and over NCCL on the host stand-in. ``RFORK_TEST_GPU=1`` takes NCCL and two GPUs; ``RFORK_TEST_ROUNDS`` is
the number of receivers of each kind.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest

from tests.standin import build
from vllm_rfork.engines.collective.group import STALL_S
from vllm_rfork.engines.collective.sender import MAX_SENDS
from vllm_rfork.testing import MIB, EngineContract, Processes, WorkerProcess

ON_GPU = os.environ.get("RFORK_TEST_GPU") == "1"
NBYTES = 16 * MIB
#: Copies of the source in one read of a victim: long, so that few are stopped between two reads.
COPIES = 64 if ON_GPU else 8
LEAK_NBYTES = 32 * MIB
#: So that what remains is a leak. NCCL's service for diagnoses keeps sockets to processes that are gone, for a minute;
#: glibc keeps 40 MB of freed memory for each of many arenas, in which NCCL's threads create groups.
PLAIN = {"NCCL_RAS_ENABLE": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(MIB)}


class Tcp(EngineContract):
    __test__ = False
    engine: ClassVar[str] = "collective"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.collective.engine", "vllm_rfork.engines.collective.tcp")


class Nccl(EngineContract):
    __test__ = False
    engine: ClassVar[str] = "collective"
    device: ClassVar[str] = "cuda:0"
    buffer: ClassVar[str] = "tests.contracts.driver_buffer:DriverBuffer"
    preload: ClassVar[tuple[str, ...]] = ("torch", "vllm_rfork.engines.collective.engine")

    def environment(self) -> Mapping[str, str]:
        return PLAIN if ON_GPU else build.cuda_environment(build.build())


class NcclReceiver(Nccl):
    device: ClassVar[str] = "cuda:1"  # NCCL refuses two members on one GPU


class Fleet:
    """A seed, a receiver in good health, and receivers that are disturbed."""

    def __init__(self, seeds: Processes, receivers: Processes) -> None:
        self.receivers = receivers
        self.random = random.Random(1)
        self.given_up = 0
        self.seed = seeds.start()
        self.source = self.seed.alloc(NBYTES, seed=7)
        self.seed.register([self.source, NBYTES])
        self.digest = self.seed.digest(self.source)
        self.healthy, self.target = self.receiver()
        self.read_in_good_health()
        self.at_first = self.held()

    def receiver(self) -> tuple[WorkerProcess, int]:
        """A connected receiver, and its buffer."""
        worker = self.receivers.start()
        target = worker.alloc(NBYTES)
        worker.register([target, NBYTES])
        worker.connect(self.seed.endpoint())
        return worker, target

    def victim(self) -> WorkerProcess:
        """A receiver that reads over and over."""
        worker, target = self.receiver()
        segments = [[target, self.source, NBYTES]] * COPIES
        worker.send("read_loop", endpoint=self.seed.endpoint(), segments=segments, timeout_s=60.0, seconds=60.0)
        assert worker.message(60.0) == {"event": "reading"}
        return worker

    def read_in_good_health(self) -> None:
        self.healthy.call("fill", address=self.target, seed=9)
        self.healthy.read(self.seed.endpoint(), [[self.target, self.source, NBYTES]])
        assert self.healthy.digest(self.target) == self.digest

    def disturb(self, number: signal.Signals, together: int) -> None:
        """Signal ``together`` receivers in the middle of their reads, before a read in good health."""
        victims = [self.victim() for _ in range(together)]
        threads = (self.held()[0] - self.at_first[0]) // together
        for victim in victims:
            time.sleep(self.random.uniform(0.0, 0.02))  # at any moment of the read
            victim.signal(number)
        self.read_in_good_health()
        if number is signal.SIGSTOP:
            self.settled(within_s=STALL_S + 3.0)
            self.given_up += together - (self.held()[0] - self.at_first[0]) // threads
        for victim in victims:
            victim.kill()
        assert self.settled(within_s=10.0), f"threads and descriptors: {self.at_first} at first, now {self.held()}"

    def settled(self, within_s: float) -> bool:
        """Wait until the seed has the threads and descriptors of one group, that of the receiver in good health."""
        end = time.monotonic() + within_s
        while self.held() != self.at_first and time.monotonic() < end:
            time.sleep(0.05)
        return self.held() == self.at_first

    def held(self) -> tuple[int, int]:
        """Threads and descriptors of the seed."""
        pid = self.seed.process.pid
        return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))

    def resident_nbytes(self) -> int:
        with open(f"/proc/{self.seed.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def rounds(self, count: int) -> None:
        """At least ``count`` receivers killed, then as many stopped in a read; the healthy one has a send left."""
        together = MAX_SENDS - 1
        self.disturb(signal.SIGKILL, together)
        resident = self.resident_nbytes()
        for _ in range(0, count, together):
            self.disturb(signal.SIGKILL, together)
        for _ in range(0, 2 * count, together):  # some are stopped between two reads, and keep their groups for longer
            if self.given_up < count:
                self.disturb(signal.SIGSTOP, together)
        assert self.given_up >= count
        self.read_in_good_health()
        assert self.resident_nbytes() < resident + LEAK_NBYTES


@pytest.fixture(
    params=[(Nccl, NcclReceiver)] if ON_GPU else [(Tcp, Tcp), (Nccl, NcclReceiver)], ids=lambda each: each[0].__name__
)
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    seed, receiver = request.param
    seeds, receivers = Processes(seed()), Processes(receiver())
    try:
        yield Fleet(seeds, receivers)
    finally:
        receivers.end()
        seeds.end()


@pytest.mark.long  # the contract suite kills one receiver in `make test`
@pytest.mark.timeout(1800)  # each of a hundred receivers that are stopped is waited for
def test_a_hundred_receivers_killed_and_stopped_leave_nothing_behind(fleet: Fleet) -> None:
    fleet.rounds(int(os.environ.get("RFORK_TEST_ROUNDS", "50")))
