"""Seed and receiver of the self-test: the work of each of the two processes with one engine."""

from __future__ import annotations

import ctypes
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import msgspec

from vllm_rfork.engines.base import EngineConfig, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment, batches
from vllm_rfork.selftest.buffers import Buffer

_MIB = 1 << 20
_PIECE = 16 * _MIB
#: Two-sided engines send a lease to the seed, and only a planner grants one.
_LEASE = "selftest"
#: Stages that move all bytes, and so have a speed.
MOVES = FRESH, AGAIN, MEMCPY = ("read into fresh memory", "read again", "memcpy beside it")


@dataclass(frozen=True)
class Trial:
    """The parameters of one engine's run.

    Attributes:
        engine, host: as for workers.
        device, seed_device: torch devices of the receiver and of the seed.
        nbytes: bytes to fork.
        timeout_s: bound of all of it, in seconds.
        corrupt: alter the seed's memory after its digest was computed.
        native_log: leave the output of native libraries on the terminal.
    """

    engine: str
    device: str = "cpu"
    seed_device: str = "cpu"
    nbytes: int = 256 * _MIB
    host: str = "127.0.0.1"
    timeout_s: float = 120.0
    corrupt: bool = False
    native_log: bool = False


class Published(msgspec.Struct, frozen=True):
    """The seed's message: its endpoint, and address, length in bytes and digest of each buffer."""

    endpoint: str
    buffers: list[tuple[int, int, str]]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(nbytes for _, nbytes, _ in self.buffers)


@dataclass(frozen=True)
class Result:
    """The receiver's message: lane, numbers of the wrong buffers, count, bytes, and seconds by stage, in order."""

    lane: str
    wrong: list[int]
    count: int
    nbytes: int
    seconds: dict[str, float]

    def gb_per_s(self, stage: str) -> float | None:
        """The speed of a stage that moved all bytes; None if it did not run."""
        seconds = self.seconds.get(stage, 0.0)
        return self.nbytes / seconds / 1e9 if stage in MOVES and seconds > 0 else None


def seed(trial: Trial, parent: Connection) -> None:
    """Publish random buffers, and hold them until the parent closes its end."""
    engine = _opened(trial, trial.seed_device)
    buffers = [Buffer(trial.seed_device, nbytes) for nbytes in buffer_sizes(trial.nbytes)]
    _fill(buffers)
    digests = _digests(buffers)
    engine.register([Region(buffer.address, buffer.nbytes) for buffer in buffers])
    if trial.corrupt:
        middle = buffers[len(buffers) // 2]
        middle.write(middle.nbytes // 2, bytes([middle.read(middle.nbytes // 2, 1)[0] ^ 1]))
    described = [(buffer.address, buffer.nbytes, digest) for buffer, digest in zip(buffers, digests, strict=True)]
    parent.send(Published(engine.endpoint, described))
    parent.poll(None)
    engine.close()


def receiver(trial: Trial, parent: Connection) -> None:
    """Read what the seed published, compare digests, and send a :class:`Result`."""
    stages = _Stages()
    published: Published = parent.recv()
    _refuse_obstacle(trial, published.endpoint)
    with stages.timed("engine open"):
        engine = _opened(trial, trial.device)
    buffers = [Buffer(trial.device, nbytes) for _, nbytes, _ in published.buffers]
    with stages.timed("register"):
        engine.register([Region(buffer.address, buffer.nbytes) for buffer in buffers])
    engine.present_lease(_LEASE)
    with stages.timed("connect"):
        engine.connect(published.endpoint, trial.timeout_s)
    lane = engine.lane(published.endpoint)
    pairs = list(zip(buffers, published.buffers, strict=True))
    segments = [Segment(mine.address, address, mine.nbytes) for mine, (address, _, _) in pairs]
    with stages.timed(FRESH):
        _read(engine, published.endpoint, segments, trial)
    arrived = _digests(buffers)
    wrong = [number for number, (_, _, digest) in enumerate(published.buffers) if arrived[number] != digest]
    with stages.timed(AGAIN):
        _read(engine, published.endpoint, segments, trial)
    if trial.device == "cpu":
        _copy_beside(buffers, stages)
    engine.disconnect(published.endpoint)
    engine.close()
    parent.send(Result(lane, wrong, len(buffers), published.nbytes, stages.seconds))


def _copy_beside(buffers: Sequence[Buffer], stages: _Stages) -> None:
    """Copy the bytes once within this process, to compare: the speed that this machine's memory permits."""
    copies = [Buffer("cpu", buffer.nbytes) for buffer in buffers]
    for copy in copies:
        ctypes.memset(copy.address, 1, copy.nbytes)
    with stages.timed(MEMCPY):
        for copy, buffer in zip(copies, buffers, strict=True):
            ctypes.memmove(copy.address, buffer.address, buffer.nbytes)


def buffer_sizes(nbytes: int) -> list[int]:
    """Lengths that add up to ``nbytes``: a quarter in one piece, then pieces of 1 MiB, then odd small ones."""
    sizes: list[int] = []
    left = nbytes
    for odd in (1, 7, 333, 4097, 65_537):
        if left > 2 * odd:
            sizes.append(odd)
            left -= odd
    large = left // 4
    if large:
        sizes.append(large)
        left -= large
    while left:
        sizes.append(min(left, _MIB))
        left -= sizes[-1]
    return sizes[::-1]


def _config(trial: Trial, device: str) -> EngineConfig:
    return EngineConfig(device=device, host=trial.host, timeout_s=trial.timeout_s)


def _opened(trial: Trial, device: str) -> TransferEngine:
    engine = engine_class(trial.engine)()
    engine.open(_config(trial, device))
    return engine


def _refuse_obstacle(trial: Trial, endpoint: str) -> None:
    """Raise EngineError if no lane leads to ``endpoint``, before the engine is opened, as a fork does."""
    obstacle = engine_class(trial.engine).lane_obstacle(endpoint, _config(trial, trial.device))
    if obstacle is not None:
        raise EngineError(trial.engine, "connect", obstacle, code="lane", side="receiver")


def _fill(buffers: Sequence[Buffer]) -> None:
    """Fill with random bytes; no two pieces of 16 MiB and no two buffers are equal, so a misplaced one is noticed.

    The system's own random source would take seconds for each GB.
    """
    pool = os.urandom(_PIECE + len(buffers))
    for number, buffer in enumerate(buffers):
        for offset in range(0, buffer.nbytes, _PIECE):
            taken = min(_PIECE, buffer.nbytes - offset)
            unique = os.urandom(min(taken, 64))
            buffer.write(offset, pool[number : number + taken - len(unique)] + unique)


def _digests(buffers: Sequence[Buffer]) -> list[str]:
    """One digest per buffer, on several threads: hashing is slower than moving."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(_digest, buffers))


def _digest(buffer: Buffer) -> str:
    digest = hashlib.blake2b()
    for offset in range(0, buffer.nbytes, _PIECE):
        digest.update(buffer.read(offset, min(_PIECE, buffer.nbytes - offset)))
    return digest.hexdigest()


def _read(engine: TransferEngine, endpoint: str, segments: Sequence[Segment], trial: Trial) -> None:
    limits = engine.limits_for(endpoint)
    for batch in batches(segments, max_nbytes=limits.max_batch_nbytes, max_items=limits.max_batch_items):
        engine.read(endpoint, batch, trial.timeout_s)


class _Stages:
    """Seconds by stage, in the order in which they ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
