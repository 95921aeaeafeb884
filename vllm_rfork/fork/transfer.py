"""The transfer from one seed: manifest, pairing, lane, epoch, read, epoch again.

Begins with a lease that the planner granted, and ends with the seed's bytes in this worker's registered memory or with
a :class:`~vllm_rfork.errors.ForkError` that states whose failure it was and whether another seed may do better.
Neither asks the planner nor releases the lease.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from vllm_rfork.clients import LeaseKeeper, SeedClient
from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.errors import EngineError, ForkError
from vllm_rfork.fork import lanes
from vllm_rfork.fork.engine_handle import call_engine
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.lanes import Lane
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.logs.worker import LoggedTexts, worker_logger
from vllm_rfork.manifest.checkpoint_identity import compare
from vllm_rfork.manifest.pairing import pair
from vllm_rfork.manifest.schema import Manifest, Region
from vllm_rfork.manifest.segments import Segment, batches
from vllm_rfork.net.event_loop import background

logger = worker_logger(__name__)

T = TypeVar("T")

#: Bytes per second below which a read is abandoned: storage is faster.
MIN_BYTES_PER_S = 50e6


class Landing(Protocol):
    """Registered memory that batches are read into, in place of local spans that cannot be registered."""

    @property
    def nbytes(self) -> int:
        """The largest batch."""

    @property
    def regions(self) -> Sequence[Region]:
        """The memory to register."""

    @property
    def memory(self) -> Any:
        """An object that keeps the regions alive."""

    def redirected(self, batch: Sequence[Segment]) -> list[Segment]:
        """The reads of ``batch`` with local addresses in the regions."""

    def deliver(self, batch: Sequence[Segment]) -> None:
        """Copy what has been read for ``batch`` to its place, before another batch is read."""


@dataclass(frozen=True)
class TransferRequest:
    """The receiver's side of a transfer.

    Attributes:
        local: the receiver's manifest; its endpoints and ``epoch`` are ignored.
        engines: the receiver's; those that are tried register the manifest's regions.
        memory: keeps the regions alive while they are registered.
        request_timeout_s: bound of each HTTP call, and the minimum for each native one.
        timeout_s: bound of the whole transfer.
        max_batch_nbytes: ``rfork_max_batch_bytes``; None for the engine's own bound.
        checkpoint: returns the identity of this worker's own checkpoint files; may wait for it.
        untouched: addresses of local spans that are not read, because other models use them already.
        landing: the memory to read into and register instead of the manifest's regions; None: read into these.
        logged: the texts that this load has logged already.
        connected: called with the engine's name and the lane, such as ``nixl/rdma``, when the peer is reached.
        first_write: called immediately before the first byte may be written.
        arrived: called with the segments that have just been copied; returns at once.
        progress: called with the number of bytes copied so far.
    """

    local: Manifest
    engines: EngineSet
    memory: Any
    seeds: SeedClient
    request_timeout_s: float
    timeout_s: float
    max_batch_nbytes: int | None = None
    untouched: frozenset[int] = frozenset()
    landing: Landing | None = None
    checkpoint: Callable[[], Mapping[str, str] | None] = lambda: None
    logged: LoggedTexts = field(default_factory=LoggedTexts)
    connected: Callable[[str, str], None] = lambda engine, lane: None
    first_write: Callable[[], None] = lambda: None
    arrived: Callable[[Sequence[Segment]], None] = lambda segments: None
    progress: Callable[[int], None] = lambda nbytes: None


def transfer(request: TransferRequest, keeper: LeaseKeeper, times: StageTimes) -> Manifest:
    """Copy the leased seed's weights into the local spans; returns the seed's manifest, for its digests.

    Args:
        keeper: of the lease; already renewing.

    Raises:
        ForkError: one of its subclasses.
    """
    deadline = time.monotonic() + request.timeout_s
    seed = keeper.lease.seed
    with times.stage("metadata"):
        remote = _wait(request, request.seeds.manifest(seed, request.local.seed_key, request.local.fingerprint))
    with times.stage("pairing"):
        segments = _pair(request, remote, str(seed))
    target = request.landing
    regions, memory = (request.local.regions, request.memory) if target is None else (target.regions, target.memory)
    receiver = lanes.Receiver(request.engines, regions, memory, request.request_timeout_s, deadline, request.logged)
    lane = lanes.connect(receiver, remote, str(seed), keeper.lease.user_id, times)
    request.connected(lane.handle.name, lane.name)

    def confirm_epoch() -> None:
        with times.stage("epoch"):
            _wait(request, request.seeds.confirm_epoch(seed, request.local.seed_key, remote.epoch))

    try:
        with _disconnecting(lane, request.request_timeout_s):
            confirm_epoch()  # addresses are valid only within their epoch: read nothing if it is over ...
            request.first_write()
            with times.stage("read"):
                _read(request, lane, keeper, segments, deadline)
            confirm_epoch()  # ... and the bytes are the manifest's only if the epoch still holds after the last one
            keeper.check()
    except EngineError as error:
        if error.in_flight:
            # Bytes may still arrive: no other engine and no other seed may write to this memory.
            error.retry_elsewhere = False
            lane.handle.abandon(memory)
        raise
    return remote


@contextlib.contextmanager
def _disconnecting(lane: Lane, timeout_s: float) -> Iterator[None]:
    """Disconnect at the end of the block."""
    try:
        yield
    finally:
        try:
            call_engine(lane.engine, "connect", timeout_s, lambda: lane.engine.disconnect(lane.endpoint))
        except EngineError as error:
            # Raised, it would replace the first error, which states whether a read is in flight; an engine that is
            # stuck in a read fails here as well.
            logger.warning("%s", error)


def _pair(request: TransferRequest, remote: Manifest, seed: str) -> list[Segment]:
    """The copies to make, if both sides have the same tensors."""
    compare(request.checkpoint(), remote.checkpoint, seed)
    return [segment for segment in pair(request.local, remote) if segment.local not in request.untouched]


def _wait(request: TransferRequest, call: Coroutine[Any, Any, T]) -> T:
    """The result of a client call. The call is bounded itself; this bound is for an event loop that hangs."""
    try:
        return background().call(call, request.request_timeout_s + 1.0)
    except TimeoutError as error:
        raise ForkError("the background thread of this process does not answer", side="receiver") from error


def _read(request: TransferRequest, lane: Lane, keeper: LeaseKeeper, segments: list[Segment], deadline: float) -> None:
    limits = lane.engine.limits_for(lane.endpoint)
    max_nbytes = limits.batch_nbytes(request.max_batch_nbytes)
    if max_nbytes < (request.max_batch_nbytes or 0):
        logger.info(
            "rfork_max_batch_bytes is %d, but engine %s reads at most %d bytes at once",
            request.max_batch_nbytes,
            lane.handle.name,
            max_nbytes,
        )
    landing, copied = request.landing, 0
    if landing is not None:
        max_nbytes = min(max_nbytes, landing.nbytes)
    for batch in batches(segments, max_nbytes=max_nbytes, max_items=limits.max_batch_items):
        keeper.check()
        nbytes = sum(segment.nbytes for segment in batch)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise ForkError(
                f"the fork took longer than {request.timeout_s:g} s (rfork_fork_timeout_sec); "
                f"{copied} bytes had been copied"
            )
        timeout_s = min(left_s, request.request_timeout_s + nbytes / MIN_BYTES_PER_S)
        read_batch(lane.engine, lane.endpoint, batch if landing is None else landing.redirected(batch), timeout_s)
        if landing is not None:
            landing.deliver(batch)
        request.arrived(batch)
        copied += nbytes
        request.progress(copied)


def read_batch(engine: TransferEngine, endpoint: str, batch: list[Segment], timeout_s: float) -> None:
    """``engine.read`` with a deadline; see :func:`~vllm_rfork.fork.engine_handle.call_engine`."""
    call_engine(engine, "read", timeout_s, lambda: engine.read(endpoint, batch, timeout_s))
