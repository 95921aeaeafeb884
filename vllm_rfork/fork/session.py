"""A fork session: one worker's fork, from one seed after another until one works.

:meth:`ForkSession.run` returns the manifest whose bytes now are in local memory, or raises the ForkError because of
which the worker loads from storage. Either way no lease is left at the planner.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_rfork.clients import PlannerClient, SeedClient
from vllm_rfork.config import Settings
from vllm_rfork.errors import ForkError, PlannerError, SeedError
from vllm_rfork.fork import lanes
from vllm_rfork.fork.engine_set import EngineSet
from vllm_rfork.fork.intent import Intent
from vllm_rfork.fork.leases import HeldLease, Leases, Usage
from vllm_rfork.fork.other_seeds import OtherFingerprints
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.fork.transfer import Landing, TransferRequest, transfer
from vllm_rfork.logs.worker import LoggedTexts, worker_logger
from vllm_rfork.manifest.checkpoint_identity import compare
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.messages import OtherSeeds, SeedAddress
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.event_loop import background

logger = worker_logger(__name__)

#: Seeds that one start tries before it reads storage: a second seed may be better, but a third failure is the fleet's.
MAX_SEEDS = 3


def reservation_s(settings: Settings) -> float:
    """Bound of a reservation that does not wait for a seed, in seconds: asking, each seed's manifest, and an engine.

    Engines that all hang while they open cost two bounds: ``EngineSet.await_one``.
    """
    return 2 * settings.rfork_seed_timeout_sec + (1 + MAX_SEEDS) * settings.rfork_request_timeout_sec


class Sink(Protocol):
    """Takes the bytes of one seed."""

    def arrived(self, segments: Sequence[Segment]) -> None:
        """Take note of copied bytes while others are still on their way. Returns at once."""

    def accept(self, manifest: Manifest) -> None:
        """Check all bytes against the seed's manifest. Raises ForkError if they differ."""

    def close(self) -> None:
        """Release the memory, after success or failure. Idempotent."""


@dataclass(frozen=True)
class Destination:
    """The memory that a fork fills.

    Attributes:
        local: the receiver's manifest.
        sink: makes the sink of one seed's bytes; each seed gets another.
        memory: keeps the local spans alive while they are registered.
        progress: called with the number of bytes copied so far.
        untouched: addresses of local spans that are compared and never written.
        landing: see :class:`~vllm_rfork.fork.transfer.TransferRequest`.
    """

    local: Manifest
    sink: Callable[[], Sink]
    memory: Any
    progress: Callable[[int], None]
    untouched: frozenset[int] = frozenset()
    landing: Landing | None = None


class ForkSession:
    """See the module's docstring. Engines are opened in the background while the model is still being built.

    Args:
        engines: this worker's; the session closes them, or hands them to the seed that this worker becomes.
        facts: the facts behind this worker's fingerprint, as ``facts.short_facts`` returns them.
        checkpoint: returns the identity of this worker's own checkpoint files; may wait for it.

    Attributes:
        has_written: a fork may have written to its destination. True from the moment before the first read.
        seed: the seed that was forked from.
        engine, lane: the name of the engine by which the bytes came, and their path, such as ``nixl/rdma``.
        leased: a seed was leased, whatever became of it.
        storage_s: how long a load of this key from storage takes, as far as the planner knows.
        logged: the long texts that this load has logged already.
        others: the differences to seeds with other fingerprints.
    """

    def __init__(
        self,
        settings: Settings,
        seed_key: str,
        engines: EngineSet,
        facts: Mapping[str, str] | None = None,
        *,
        checkpoint: Callable[[], Mapping[str, str] | None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.seed_key = seed_key
        self.facts = dict(facts or {})
        self.has_written = self.leased = False
        self.storage_s: float | None = None
        self.seed: SeedAddress | None = None
        self.engine = self.lane = ""
        self.times = StageTimes()
        self.logged = LoggedTexts()
        self.credentials = Credentials.of(settings)
        self.labels = settings.labels(socket.gethostname())
        timeout_s = settings.rfork_request_timeout_sec
        planner = PlannerClient(
            settings.rfork_scheduler_url,
            request_timeout_s=timeout_s,
            credentials=self.credentials,
            model=settings.model_url,
            strategy=settings.model_deploy_strategy_name,
        )
        self._seeds = SeedClient(request_timeout_s=timeout_s, credentials=self.credentials)
        self.others = OtherFingerprints(self._seeds, seed_key, self.facts)
        self.intent = Intent(planner, seed_key, wanted=settings.rfork_become_seed)
        self.leases = Leases(
            settings, planner, seed_key, self.intent, labels=self.labels, warn_of_others=self.others.warn
        )
        self.engines = engines
        engines.start_opening()
        self._checkpoint = checkpoint
        self._reserved: HeldLease | None = None
        self._last_error: ForkError | None = None
        self._deadline = 0.0

    def reserve(self, fingerprint: str) -> SeedAddress:
        """Take a lease now for a later :meth:`run`, and return its seed; it is renewed meanwhile.

        The planner is asked while engines are still being opened: without a seed, none is needed.

        Raises:
            NoSeedAvailable: the planner has no seed.
            ForkError: the planner cannot be asked.
        """
        self._deadline = time.monotonic() + self.settings.rfork_fork_timeout_sec
        self.times.outside["planner"] = "before"
        self._reserved = held = self._acquire(fingerprint)
        return held.seed

    def await_engine(self) -> None:
        """Wait until an engine is open, for the reserved lease.

        Raises:
            EngineError: none can be opened; nothing is reserved any more.
        """
        try:
            self.engines.await_one()
        except BaseException:
            self.cancel_reservation()
            raise

    def peek(self, fingerprint: str) -> Manifest:
        """The manifest of the reserved seed. A seed without a usable one, with another checkpoint, or out
        of reach of every engine, is exchanged.

        Raises:
            ForkError: no seed returned one; nothing is reserved any more.
        """
        while True:
            held = self._reserved
            if held is None:
                raise PlannerError("no seed is reserved")
            usage = Usage(time.monotonic())
            self.times.outside["first metadata"] = "before"
            try:
                with self.times.stage("first metadata"):
                    manifest = background().call(
                        self._seeds.manifest(held.seed, self.seed_key, fingerprint),
                        self.settings.rfork_request_timeout_sec + 1.0,
                    )
                compare(self._checkpoint(), manifest.checkpoint, str(held.seed))
                lanes.check_offer(self.engines, manifest, str(held.seed))
                return manifest
            except TimeoutError as error:
                self.cancel_reservation()
                raise ForkError("the background thread of this process does not answer", side="receiver") from error
            except ForkError as error:
                self._reserved = None
                self.leases.release(held, usage, error)
                self._exclude(held, error)
                self._reserved = self._acquire(fingerprint)

    def cancel_reservation(self) -> None:
        """Release the reserved lease unused; the seed is not to blame. Idempotent."""
        held, self._reserved = self._reserved, None
        if held is not None:
            self.leases.release(held)

    def run(self, destination: Destination) -> Manifest:
        """Fork from the first seed that works, beginning with the reserved one; returns the seed's manifest.

        Raises:
            NoSeedAvailable: the planner has no seed.
            ForkError: the last seed's error.
        """
        self.engines.await_one()
        # A new one: the time that post-processing took since the reservation is not the fork's.
        self._deadline = time.monotonic() + self.settings.rfork_fork_timeout_sec
        while True:
            held, self._reserved = self._reserved, None
            if held is None:
                held = self._acquire(destination.local.fingerprint)
            usage = Usage(time.monotonic())
            try:
                manifest = self._fork_once(held, destination, usage)
            except BaseException as error:
                self.leases.release(held, usage, error)
                if not isinstance(error, Exception):
                    raise
                if not isinstance(error, ForkError):
                    # A fork runs third-party code, and whatever that raises must end in a correct model.
                    text = f"unexpected {type(error).__name__}: {error}"
                    raise ForkError(text, side="receiver") from error
                self._exclude(held, error)
                continue
            usage.nbytes = manifest.nbytes
            self.leases.release(held, usage)
            self.seed = held.seed
            self._last_error = None  # its frames refer to the memory
            return manifest

    def left_s(self) -> float:
        """Seconds that this fork may still take (``rfork_fork_timeout_sec``).

        Raises:
            ForkError: none.
        """
        left_s = self._left_s()
        if left_s <= 0:
            bound_s = self.settings.rfork_fork_timeout_sec
            raise ForkError(
                f"the fork took longer than {bound_s:g} s (rfork_fork_timeout_sec), the seed's state included"
            )
        return left_s

    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _acquire(self, fingerprint: str) -> HeldLease:
        """A lease; if there is none after a seed has failed, that seed's error, which is what the log should name."""
        try:
            with self.times.stage("planner"):
                held = self.leases.acquire(fingerprint, self._deadline)
            self.leased, self.storage_s = True, held.lease.storage_s
            return held
        except ForkError as error:
            if self._last_error is None:
                raise
            raise self._last_error from error

    def _exclude(self, held: HeldLease, error: ForkError) -> None:
        """Exclude a seed that failed. Raises ``error`` if no other seed may be tried."""
        self._last_error = error
        self.leases.failed.append(held.seed)
        if isinstance(error, SeedError) and error.other_fingerprint:  # from a planner that does not compare them
            self.others.warn([OtherSeeds(error.other_fingerprint, 1, held.seed)])
        if not error.retry_elsewhere or len(self.leases.failed) == MAX_SEEDS or not self._left_s():
            raise error
        logger.warning("seed %s failed (%s), asking for another", held.seed, self.logged.once(error))

    def _fork_once(self, held: HeldLease, destination: Destination, usage: Usage) -> Manifest:
        sink = destination.sink()

        def progress(nbytes: int) -> None:
            usage.nbytes = nbytes
            destination.progress(nbytes)

        def connected(engine: str, lane: str) -> None:
            self.engine, self.lane, usage.lane = engine, lane, lane

        try:
            request = TransferRequest(
                local=destination.local,
                engines=self.engines,
                memory=destination.memory,
                seeds=self._seeds,
                request_timeout_s=self.settings.rfork_request_timeout_sec,
                timeout_s=self._left_s(),
                max_batch_nbytes=self.settings.rfork_max_batch_bytes,
                untouched=destination.untouched,
                landing=destination.landing,
                checkpoint=self._checkpoint,
                logged=self.logged,
                connected=connected,
                first_write=self._first_write,
                arrived=sink.arrived,
                progress=progress,
            )
            manifest = transfer(request, held.keeper, self.times)
            sink.accept(manifest)
            return manifest
        finally:
            sink.close()

    def _first_write(self) -> None:
        self.has_written = True

    def drop_tracebacks(self, error: BaseException) -> None:
        """Drop the tracebacks of this session's failures, ``error`` among them.

        Their frames refer to the model and its tensors, and the same memory is about to be needed again.
        """
        failures: list[BaseException | None] = [error, self._last_error]
        self._last_error = None
        while failures:
            failure = failures.pop()
            if failure is not None and failure.__traceback__ is not None:
                failure.__traceback__ = None
                failures += [failure.__cause__, failure.__context__]

    def close(self) -> None:
        """End a session whose worker is not a seed: no reservation, no intent, no engine. Idempotent."""
        self.cancel_reservation()
        self.intent.withdraw()
        self.engines.close()
