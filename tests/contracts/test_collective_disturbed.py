"""Receivers that die or stop in the middle of a read cost the seed their own groups, and nothing else."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from typing import ClassVar

import pytest

from vllm_rfork.engines.collective.group import STALL_S
from vllm_rfork.engines.collective.sender import MAX_SENDS
from vllm_rfork.testing import MIB, EngineContract, Processes, WorkerProcess

NBYTES = 16 * MIB
LEAK_NBYTES = 32 * MIB
THREADS_OF_A_GROUP = 3  # the session's and two of gloo


class Suite(EngineContract):
    __test__ = False
    engine: ClassVar[str] = "collective"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.collective.engine", "vllm_rfork.engines.collective.gloo")


class Fleet:
    """A seed, a receiver in good health, and receivers that are disturbed."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.random = random.Random(1)
        self.given_up = 0
        self.seed, self.healthy, self.source, self.target, self.endpoint = Suite().seed_and_receiver(processes, NBYTES)
        self.digest = self.seed.digest(self.source)
        self.read_in_good_health()

    def disturb(self, number: signal.Signals, together: int) -> None:
        """Signal ``together`` receivers in the middle of their reads, during a read in good health."""
        victims = [self.victim() for _ in range(together)]
        self.healthy.call("fill", address=self.target, seed=9)
        self.healthy.send("read", endpoint=self.endpoint, segments=[[self.target, self.source, NBYTES]], timeout_s=30.0)
        for victim in victims:
            time.sleep(self.random.uniform(0.0, 0.02))  # at any moment of the read
            victim.signal(number)
        self.healthy.result()
        assert self.healthy.digest(self.target) == self.digest
        if number is signal.SIGSTOP:
            self.given_up += together - self.groups_left(within_s=STALL_S + 3.0)
        for victim in victims:
            victim.kill()

    def victim(self) -> WorkerProcess:
        """A receiver that reads over and over."""
        worker = self.processes.start()
        target = worker.alloc(NBYTES)
        worker.register([target, NBYTES])
        worker.connect(self.endpoint)
        segments = [[target, self.source, NBYTES]] * 8  # long, so that few are stopped between two reads
        worker.send("read_loop", endpoint=self.endpoint, segments=segments, timeout_s=60.0, seconds=60.0)
        assert worker.message(60.0) == {"event": "reading"}
        return worker

    def read_in_good_health(self) -> None:
        self.healthy.read(self.endpoint, [[self.target, self.source, NBYTES]])
        assert self.healthy.digest(self.target) == self.digest

    def groups_left(self, within_s: float) -> int:
        """Groups of the seed beside that of the receiver in good health, 0 as soon as there are none."""
        end = time.monotonic() + within_s
        while (held := self.held()) != self.at_first and time.monotonic() < end:
            time.sleep(0.05)
        return -((self.at_first[0] - held[0]) // THREADS_OF_A_GROUP) or int(held != self.at_first)

    def settled(self) -> None:
        """The seed has no other threads and descriptors than at first, soon after every victim has died."""
        assert self.groups_left(within_s=5.0) == 0, (self.held(), self.at_first)

    def held(self) -> tuple[int, int]:
        pid = self.seed.process.pid
        return len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))

    def resident_nbytes(self) -> int:
        with open(f"/proc/{self.seed.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def rounds(self, count: int) -> None:
        """``count`` receivers killed, then ``count`` stopped, as many at a time as leave the healthy one a send."""
        together = MAX_SENDS - 1
        self.at_first = self.held()
        self.disturb(signal.SIGKILL, together)
        self.settled()
        resident = self.resident_nbytes()
        for number in (signal.SIGKILL, signal.SIGSTOP):
            for done in range(0, count, together):
                self.disturb(number, min(together, count - done))
                self.settled()
        assert self.given_up >= 0.8 * count, "a receiver that is stopped between two reads keeps its group for longer"
        self.read_in_good_health()
        assert self.resident_nbytes() < resident + LEAK_NBYTES


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    processes = Processes(Suite())
    try:
        yield Fleet(processes)
    finally:
        processes.end()


def test_receivers_killed_and_stopped_in_a_read_cost_their_own_groups(fleet: Fleet) -> None:
    fleet.rounds(5)


@pytest.mark.long
def test_a_hundred_receivers_killed_and_stopped_leave_nothing_behind(fleet: Fleet) -> None:
    fleet.rounds(50)
