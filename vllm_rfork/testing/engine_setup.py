"""The settings, fixtures and shared steps of the engine contract."""

from __future__ import annotations

import hashlib
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import ClassVar

import pytest

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.errors import EngineError
from vllm_rfork.testing.engine_processes import Processes, WorkerProcess
from vllm_rfork.testing.engine_worker import as_json, pattern

PAGE = 4096
MIB = 1 << 20


class ContractSetup:
    """The part of the engine contract that a subclass sets: ``engine``, and the rest if the defaults do not fit."""

    #: The engine's name, as ``rfork_engine`` takes it.
    engine: ClassVar[str]
    #: The torch device of the memory.
    device: ClassVar[str] = "cpu"
    #: The class of the workers' memory, as ``module:class``; it has the interface of the default.
    buffer: ClassVar[str] = "vllm_rfork.selftest.buffers:Buffer"
    #: Modules that are imported once and shared by all workers, which are then forks of one process.
    preload: ClassVar[tuple[str, ...]] = ()
    #: How long past its ``timeout_s`` a call may take to give up, in seconds.
    grace_s: ClassVar[float] = 5.0
    #: How long an engine may take to notice a dead peer, in seconds.
    dead_peer_s: ClassVar[float] = 15.0
    #: A seed's memory stays readable after its process was killed, through mappings that were open.
    memory_outlives_its_process: ClassVar[bool] = False
    #: After a read that overran, ``close`` may report that the engine keeps the memory for good.
    close_may_keep_memory: ClassVar[bool] = False
    #: A read from a port that never answers may end as ``in_flight``; the receiver then loads from storage.
    silent_peer_in_flight: ClassVar[bool] = False
    #: Bytes of the one large segment.
    large_nbytes: ClassVar[int] = 64 * MIB

    def environment(self) -> Mapping[str, str]:
        """Environment variables of the worker processes, added to the test's own."""
        return {}

    def python(self) -> str:
        """The interpreter of the worker processes."""
        return sys.executable

    def config(self) -> EngineConfig:
        """The configuration with which the workers open the engine."""
        return EngineConfig(device=self.device, host="127.0.0.1", timeout_s=20.0)

    @pytest.fixture
    def processes(self) -> Iterator[Processes]:
        started = Processes(self)
        yield started
        started.end()

    def seed_and_receiver(
        self, processes: Processes, nbytes: int
    ) -> tuple[WorkerProcess, WorkerProcess, int, int, str]:
        """Two connected workers, each with one registered buffer of ``nbytes``; their addresses, and the endpoint."""
        return self.connected(*processes.two(), nbytes)

    # -- shared steps --------------------------------------------------------------------------------------------

    def connected(
        self, seed: WorkerProcess, receiver: WorkerProcess, nbytes: int
    ) -> tuple[WorkerProcess, WorkerProcess, int, int, str]:
        """Connect the two workers; see :meth:`seed_and_receiver`."""
        source, target = seed.alloc(nbytes, seed=7), receiver.alloc(nbytes)
        seed.register([source, nbytes])
        receiver.register([target, nbytes])
        endpoint = seed.endpoint()
        receiver.connect(endpoint)
        return seed, receiver, source, target, endpoint

    def read_after_refusal(self, receiver: WorkerProcess, endpoint: str, target: int, source: int, nbytes: int) -> None:
        """Read from a seed that has just refused a read: a refusal leaves the engine usable."""
        receiver.read(endpoint, [[target, source, nbytes]])

    def check_kept(self, error: EngineError) -> None:
        """The engine may keep the memory, and reports it as the port requires."""
        self.check(error, "close")
        assert error.in_flight
        assert self.close_may_keep_memory, error

    def nothing_arrives_after_close(
        self, processes: Processes, seed: WorkerProcess, receiver: WorkerProcess, source: int, target: int, nbytes: int
    ) -> None:
        """Close, overwrite the target, let the seed continue, and compare the target when the seed has finished.

        ``close`` may report that it cannot release the memory (``in_flight``): then there is nothing to compare.
        """
        try:
            receiver.close()
        except EngineError as error:
            self.check_kept(error)
            return
        receiver.call("fill", address=target, seed=21)
        seed.signal(signal.SIGCONT)
        self.fence(processes, seed, source, nbytes)
        assert receiver.digest(target) == hashlib.blake2b(pattern(21, nbytes)).hexdigest()
        assert receiver.registered_nbytes == 0

    def fence(self, processes: Processes, seed: WorkerProcess, source: int, nbytes: int) -> None:
        """Another receiver's whole read: by its end, the seed has sent everything that it owed to an earlier one."""
        assert seed.call("ping") == "pong"
        other = processes.start()
        address = other.alloc(nbytes)
        other.register([address, nbytes])
        endpoint = seed.endpoint()
        other.connect(endpoint)
        other.read(endpoint, [[address, source, nbytes]])

    def check(self, error: EngineError, operation: str, *, in_flight: bool | None = None) -> None:
        assert (error.engine, error.operation) == (self.engine, operation), error
        assert error.text
        if in_flight is not None:
            assert error.in_flight is in_flight

    def still_good(
        self, processes: Processes, receiver: WorkerProcess, target: int, nbytes: int, *, closed: bool = False
    ) -> None:
        """After one peer's death the receiver reads from another, with a reopened engine if ``closed``."""
        if closed:
            receiver.close()
            receiver.call("open", config=as_json(self.config()))
            receiver.register([target, nbytes])
        other = processes.start()
        source = other.alloc(nbytes, seed=31)
        other.register([source, nbytes])
        endpoint = other.endpoint()
        receiver.connect(endpoint)
        receiver.read(endpoint, [[target, source, nbytes]])
        assert receiver.digest(target) == other.digest(source)
