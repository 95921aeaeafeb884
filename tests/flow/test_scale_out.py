"""Many workers start at once beside a planner process: one reads storage at most, and the others fork.

The workers are threads with the loader's own parts (ForkSession, Seed) and the memory engine; all options have their
defaults, as in the README.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.flow.memory_seed import NBYTES, contents, digest_of, manifest_of, seed_of, session_of
from tests.planner.processes import PlannerUnderTest
from vllm_rfork.clients import PlannerClient
from vllm_rfork.config import Settings, parse_config
from vllm_rfork.errors import NoSeedAvailable, VerificationError
from vllm_rfork.fork.session import Destination, ForkSession
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.net.event_loop import background
from vllm_rfork.seeding.seed import Seed
from vllm_rfork.selftest.buffers import Buffer

WITHIN_S = 120.0


class Taking:
    """Compares what has come with the seed's digest."""

    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer

    def arrived(self, segments: Sequence[Segment]) -> None:
        pass

    def accept(self, manifest: Manifest) -> None:
        if manifest.spans[0].digest != digest_of(self.buffer):
            raise VerificationError("other bytes")

    def close(self) -> None:
        pass


@dataclass
class Fleet:
    """One planner and the workers that start beside it.

    ``loading``: what a worker does that reads storage, before its weights are there.
    """

    planner: PlannerUnderTest
    options: dict[str, Any] = field(default_factory=dict)
    loading: Callable[[ForkSession], None] = lambda session: None
    sources: list[str] = field(default_factory=list)
    seeds: list[Seed] = field(default_factory=list)
    sessions: list[ForkSession] = field(default_factory=list)

    def settings(self) -> Settings:
        given = {
            "model_url": "/models/q",
            "model_deploy_strategy_name": "prod",
            "rfork_scheduler_url": self.planner.url,
            # These two are this machine's, not the test's subject.
            "rfork_seed_bind_host": "127.0.0.1",
            "rfork_seed_advertise_host": "127.0.0.1",
        }
        return parse_config({**given, **self.options}, {}).settings

    def start(self, count: int) -> None:
        """Start workers at the same moment; return when each is a seed."""
        together = threading.Barrier(count)

        def worker() -> None:
            together.wait(WITHIN_S)
            self.worker()

        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            for each in [threads.submit(worker) for _ in range(count)]:
                each.result(WITHIN_S)

    def worker(self) -> None:
        """One worker's start: a fork or storage, and then it is a seed."""
        settings = self.settings()
        session = session_of(settings)
        self.sessions.append(session)
        buffer = Buffer("cpu", NBYTES)
        try:
            session.run(Destination(manifest_of(buffer), lambda: Taking(buffer), buffer, lambda nbytes: None))
            self.sources.append("fork")
        except NoSeedAvailable:
            self.sources.append("storage")
            self.loading(session)
            if not session.intent.id:
                return  # it cannot become a seed
            buffer.write(0, contents())
        seed = seed_of(settings, session, buffer)
        seed.start()
        session.intent.stop_renewing()
        self.seeds.append(seed)

    def snapshot(self) -> dict[str, Any]:
        return background().call(PlannerClient(self.planner.url).snapshot(), WITHIN_S)

    def until(self, holds: Callable[[dict[str, Any]], object], what: str) -> dict[str, Any]:
        deadline = time.monotonic() + WITHIN_S
        while not holds(found := self.snapshot()):
            assert time.monotonic() < deadline, f"it never came true: {what}: {found}"
            time.sleep(0.05)
        return found

    def end(self) -> None:
        for seed in self.seeds:
            seed.withdraw("the test is over")
        for session in self.sessions:
            session.close()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet(PlannerUnderTest().until_ready())
    try:
        yield made
    finally:
        made.end()
        made.planner.kill()


def test_one_seed_and_eight_receivers_that_start_at_once_are_eight_forks(fleet: Fleet) -> None:
    fleet.start(1)
    fleet.until(lambda found: found["seeds"], "the first is a seed")
    fleet.start(8)
    assert fleet.sources == ["storage"] + ["fork"] * 8


def test_of_a_cold_fleet_of_ten_one_reads_storage_and_nine_fork(fleet: Fleet) -> None:
    fleet.loading = lambda session: fleet.until(lambda found: len(found["waiting"]) == 9, "nine wait for one")
    fleet.start(10)
    assert sorted(fleet.sources) == ["fork"] * 9 + ["storage"]
    found = fleet.until(lambda found: len(found["seeds"]) == 10, "all are seeds")
    (times,) = found["times"]
    assert (times["loads"], times["holds"], times["forks"]) == (1, 9, 9)


def test_when_the_loader_cannot_be_a_seed_one_other_loads_and_eight_fork(fleet: Fleet) -> None:
    first = threading.Event()

    def loading(session: ForkSession) -> None:
        waiting = 8 if first.is_set() else 9
        fleet.until(lambda found: len(found["waiting"]) == waiting, f"{waiting} wait for one")
        if waiting == 9:
            first.set()
            session.close()  # takes its intent back

    fleet.loading = loading
    fleet.start(10)
    assert sorted(fleet.sources) == ["fork"] * 8 + ["storage"] * 2


def test_after_a_restart_of_the_planner_receivers_wait_for_the_seeds_that_come_back() -> None:
    flags = ("--lease-ttl-sec", "6")
    fleet = Fleet(PlannerUnderTest(*flags).until_ready(), {"rfork_heartbeat_interval_sec": 0.5})
    try:
        fleet.start(1)
        fleet.until(lambda found: found["seeds"], "the first is a seed")
        port = fleet.planner.port
        fleet.planner.kill()
        fleet.planner = PlannerUnderTest(*flags, port=port).until_ready()
        fleet.until(lambda found: found["seeds"], "the seed is back")
        fleet.start(5)
        assert fleet.sources == ["storage"] + ["fork"] * 5
    finally:
        fleet.end()
        fleet.planner.kill()
