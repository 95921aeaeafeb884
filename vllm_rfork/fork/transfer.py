"""The fork, as one function to read from top to bottom.

:func:`fork` takes a lease that the planner granted and ends with the seed's bytes in this worker's registered
memory, or with a :class:`~vllm_rfork.errors.ForkError` that says what went wrong, whether memory may have been
written, and whether another seed may do better. It does not ask the planner, does not release the lease and does
not know what a tensor is: the loader does that. Must not import torch or vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm_rfork.clients import LeaseKeeper, SeedClient
from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.errors import EngineError, ForkError, SeedError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.checkpoint_identity import compare
from vllm_rfork.manifest.pairing import pair
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.manifest.segments import Segment, batches
from vllm_rfork.net.event_loop import background
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline

logger = worker_logger(__name__)

T = TypeVar("T")


#: The slowest read that is still a read, in bytes per second: below it a fork is abandoned. Storage does better.
SLOWEST_BYTES_PER_S = 50e6


@dataclass
class StageTimes:
    """Seconds by stage, for the milestone line and the benchmark.

    Attributes:
        outside: stages whose time is not part of the fork's own seconds, with the word that says so: ``overlapped``
            (on another thread, while the model was built) or ``before`` (the fork had not begun).
    """

    seconds: dict[str, float] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add what happens inside to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def __str__(self) -> str:
        notes = {name: f" ({word})" for name, word in self.outside.items()}
        return ", ".join(f"{name} {value:.3f} s{notes.get(name, '')}" for name, value in self.seconds.items())


@dataclass(frozen=True)
class ForkRequest:
    """What the receiver brings: its own manifest, an open engine with the regions registered, and bounds.

    Attributes:
        local: the receiver's manifest; its ``endpoint`` and ``epoch`` are not looked at.
        request_timeout_s: bound of each HTTP call and the floor of each native one.
        timeout_s: bound of the whole fork.
        max_batch_nbytes: ``rfork_max_batch_bytes``; None for the engine's own bound.
        checkpoint: gives the identity of this worker's own files; may wait for it.
        untouched: addresses of local spans that are not read, since others use them already.
        progress: called with bytes copied so far.
        first_write: called once, immediately before the first byte may be written.
        arrived: called with what has just been copied; returns at once.
        connected: called with the lane, such as ``nixl/rdma``, once the peer is reached.
    """

    local: Manifest
    engine: TransferEngine
    seeds: SeedClient
    request_timeout_s: float
    timeout_s: float
    max_batch_nbytes: int | None = None
    untouched: frozenset[int] = frozenset()
    checkpoint: Callable[[], Mapping[str, str] | None] = lambda: None
    progress: Callable[[int], None] = lambda nbytes: None
    first_write: Callable[[], None] = lambda: None
    arrived: Callable[[Sequence[Segment]], None] = lambda segments: None
    connected: Callable[[str], None] = lambda lane: None


def fork(request: ForkRequest, keeper: LeaseKeeper, times: StageTimes) -> Manifest:
    """Copy the leased seed's weights into the local spans; returns the seed's manifest, for the digests in it.

    Args:
        keeper: of the lease; already renewing.

    Raises:
        ForkError: one of its subclasses; ``mutated`` once the first read has begun.
    """
    deadline = time.monotonic() + request.timeout_s
    seed = keeper.lease.seed
    with times.stage("metadata"):
        remote = _wait(request, request.seeds.manifest(seed, request.local.seed_key, request.local.fingerprint))
    with times.stage("pairing"):
        if remote.engine != request.local.engine:
            raise SeedError(
                f"seed {seed} transfers with engine {remote.engine}, this worker with {request.local.engine}; "
                "give both the same rfork_engine"
            )
        compare(request.checkpoint(), remote.checkpoint, str(seed))
        paired = pair(request.local, remote)
        segments = [segment for segment in paired if segment.local not in request.untouched]
    with times.stage("connect"):
        bound_s = request.request_timeout_s
        bounded(request.engine, "connect", bound_s, lambda: request.engine.connect(remote.endpoint, bound_s))
        request.connected(request.engine.lane(remote.endpoint))
    reading = False
    try:
        with times.stage("epoch"):
            # Addresses are good within their epoch alone: no byte is read by those of one that is over ...
            _wait(request, request.seeds.confirm_epoch(seed, request.local.seed_key, remote.epoch))
        reading = True
        request.first_write()
        with times.stage("read"):
            _read(request, keeper, remote, segments, deadline)
        with times.stage("epoch"):
            # ... and what was read is the manifest's only if the seed still vouches for it after the last byte.
            _wait(request, request.seeds.confirm_epoch(seed, request.local.seed_key, remote.epoch))
        keeper.check()
    except ForkError as error:
        error.mutated = error.mutated or reading
        raise
    finally:
        try:
            bounded(request.engine, "connect", bound_s, lambda: request.engine.disconnect(remote.endpoint))
        except EngineError as error:
            # It must not hide the first error, which says whether a read is in flight: an engine that is stuck in
            # one fails here as well.
            logger.warning("%s", error)
    return remote


def _wait(request: ForkRequest, call: Coroutine[Any, Any, T]) -> T:
    """A client call, which bounds itself; the bridge's own bound is for a loop that stands still."""
    try:
        return background().call(call, request.request_timeout_s + 1.0)
    except TimeoutError as error:
        raise ForkError("the background thread of this process does not answer", side="receiver") from error


def _read(
    request: ForkRequest, keeper: LeaseKeeper, remote: Manifest, segments: list[Segment], deadline: float
) -> None:
    limits = request.engine.limits
    max_nbytes = min(request.max_batch_nbytes or limits.max_batch_nbytes, limits.max_batch_nbytes)
    copied = 0
    for batch in batches(segments, max_nbytes=max_nbytes, max_items=limits.max_batch_items):
        keeper.check()
        nbytes = sum(segment.nbytes for segment in batch)
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise ForkError(
                f"the fork took longer than {request.timeout_s:g} s (rfork_fork_timeout_sec); "
                f"{copied} bytes had been copied"
            )
        timeout_s = min(left_s, request.request_timeout_s + nbytes / SLOWEST_BYTES_PER_S)
        bounded_read(request.engine, remote.endpoint, batch, timeout_s)
        request.arrived(batch)
        copied += nbytes
        request.progress(copied)


def bounded_read(engine: TransferEngine, endpoint: str, batch: list[Segment], timeout_s: float) -> None:
    """``engine.read`` within its bound; see :func:`bounded`."""
    bounded(engine, "read", timeout_s, lambda: engine.read(endpoint, batch, timeout_s))


def bounded(engine: TransferEngine, operation: str, timeout_s: float, call: Callable[[], None]) -> None:
    """Make a native call on a thread of its own, given up where the engine does not keep its own bound.

    Args:
        timeout_s: that bound, in seconds.

    Raises:
        EngineError: the engine's own, or ``in_flight`` where it did not return one second after its bound: the
            thread and the buffers then belong to it for the rest of the process's life.
    """
    bound_s = timeout_s + 1.0
    try:
        call_with_deadline(call, bound_s, f"rfork-{operation}")
    except DeadlineExceeded as late:
        raise EngineError(
            engine.name,
            operation,
            str(late),
            mutated=operation == "read",
            retry_elsewhere=False,
            in_flight=True,
            side=None,  # by the operation
        ) from None
    except ForkError:
        raise
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {error}"
        raise EngineError(engine.name, operation, text, side="receiver") from error
