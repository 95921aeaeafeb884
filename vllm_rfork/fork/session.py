"""One worker's attempt to fork: its engine, its planner client, its leases, and another seed when one fails.

Ends in one of two ways: :meth:`Attempt.run` returns the manifest whose bytes now lie in local memory, or raises the
ForkError that the loader falls back on. Either way no lease is left at the planner. Must not import torch or vLLM.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_rfork import messages
from vllm_rfork.clients import LeaseKeeper, PlannerClient, SeedClient
from vllm_rfork.config import Settings
from vllm_rfork.engines.base import EngineConfig, TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, ForkError, NoSeedAvailable, PlannerError, SeedError
from vllm_rfork.fork.other_seeds import warn_of_other_fingerprints
from vllm_rfork.fork.seed_wait import Question
from vllm_rfork.fork.transfer import ForkRequest, StageTimes, bounded, fork
from vllm_rfork.logs.worker import Told, worker_logger
from vllm_rfork.manifest.checkpoint_identity import compare
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.manifest.segments import Segment
from vllm_rfork.messages import Lease, OtherSeeds, SeedAddress
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.net.event_loop import BackgroundTask, background
from vllm_rfork.threads.deadline import start_on_thread

logger = worker_logger(__name__)

#: Seeds that one start tries before it reads storage: a second may be better, a third failure is the fleet's.
MAX_SEEDS = 3
#: How long the planner remembers that this worker loads from storage, unless renewed: others wait for it, so its death
#: has to be noticed soon.
INTENT_TTL_S = messages.TICKET_INTENT_TTL_S
#: What taking it back may cost a start, in seconds; a planner that is slower than that hears of it all the same.
TAKE_BACK_S = 1.0

#: Buffers and engines of reads that could not be ended. They belong to the wire for the rest of the process's life.
_given_up: list[Any] = []


class Incoming(Protocol):
    """Takes what one seed sends."""

    def arrived(self, segments: Sequence[Segment]) -> None:
        """These bytes are there, and others are still on their way. Returns at once."""

    def accept(self, manifest: Manifest) -> None:
        """All bytes are there; raises ForkError where they are not what the seed's manifest says."""

    def close(self) -> None:
        """Let go of the memory, whatever became of it. Idempotent."""


@dataclass(frozen=True)
class Target:
    """Where a fork goes.

    Attributes:
        local: the receiver's manifest.
        incoming: makes what takes the bytes of one seed; a second seed's get another.
        keep: what keeps the local spans alive, for as long as they are registered.
        progress: called with the number of bytes copied so far.
        untouched: addresses of local spans that are compared and never written.
    """

    local: Manifest
    incoming: Callable[[], Incoming]
    keep: Any
    progress: Callable[[int], None]
    untouched: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Grant:
    """A lease, and what renews it."""

    lease: Lease
    keeper: LeaseKeeper


@dataclass
class _Tally:
    """What one fork did so far: the report that the planner gets when it ends.

    Attributes:
        since: when it began (``time.monotonic``): not when the lease was granted, which may be long before.
        nbytes: bytes copied.
        lane: see :meth:`~vllm_rfork.engines.base.TransferEngine.lane`.
    """

    since: float
    nbytes: int = 0
    lane: str = ""


class Attempt:
    """Makes a worker ready to fork while its model is still being built; see the module's docstring.

    Args:
        engine_name: an entry of ``engines/registry.py``.
        engine_config: how to open it; opening begins at once, on a thread of its own.
        facts: what is behind this worker's fingerprint, as ``facts.short_facts`` gives it.
        checkpoint: gives the identity of this worker's own checkpoint files; may wait for it.
    """

    def __init__(
        self,
        settings: Settings,
        seed_key: str,
        engine_name: str,
        engine_config: EngineConfig,
        facts: Mapping[str, str] | None = None,
        *,
        checkpoint: Callable[[], Mapping[str, str] | None] = lambda: None,
    ) -> None:
        self.settings = settings
        self.seed_key = seed_key
        self.engine_name = engine_name
        self.times = StageTimes()
        self.intent = uuid.uuid4().hex if settings.rfork_become_seed else ""
        #: A fork may have written to the destination. Set in one place, immediately before the first read.
        self.has_written = False
        self.seed: SeedAddress | None = None
        self.lane = engine_name
        self.facts = dict(facts or {})
        self.checkpoint = checkpoint
        self._warned_of_others = False
        self.told = Told()
        self._reserved: _Grant | None = None
        self._failed: list[SeedAddress] = []
        self._last: ForkError | None = None
        self._deadline = 0.0
        self._waited_s = 0.0  # for seeds, in all
        #: set by the owner: why this instance needs no seed any more, empty while it does; asked while waiting
        self.given_up: Callable[[], str] | None = None
        timeout_s = settings.rfork_request_timeout_sec
        self.credentials = Credentials.of(settings)
        self.labels = settings.labels(socket.gethostname())
        self._planner = PlannerClient(
            settings.rfork_scheduler_url, request_timeout_s=timeout_s, credentials=self.credentials
        )
        self._seeds = SeedClient(request_timeout_s=timeout_s, credentials=self.credentials)
        self._engine_config = engine_config
        self._intending: BackgroundTask | None = None
        self._intent_stands = False  # the planner may remember the intent
        self._registered: Any = None  # what keeps registered memory alive until the engine is closed
        self._opening = start_on_thread(self._open, "rfork-engine")

    def _open(self) -> TransferEngine:
        started = time.perf_counter()
        try:
            engine = engine_class(self.engine_name)()
            engine.open(self._engine_config)
        except ForkError:
            raise
        except BaseException as error:
            text = f"unexpected {type(error).__name__}: {error}"
            raise EngineError(self.engine_name, "open", text) from error
        self.times.seconds["engine"] = time.perf_counter() - started
        self.times.outside["engine"] = "overlapped"
        return engine

    def engine(self) -> TransferEngine:
        """The open engine; waits for it.

        Raises:
            EngineError: it could not be opened, or not in time.
        """
        try:
            return self._opening.result(self._engine_config.timeout_s + 1.0)
        except concurrent.futures.TimeoutError as error:
            raise EngineError(
                self.engine_name, "open", f"not open after {self._engine_config.timeout_s + 1.0:g} s"
            ) from error

    def reserve(self, fingerprint: str) -> None:
        """Take a lease now for a :meth:`run` that comes later; it is renewed meanwhile.

        Raises:
            NoSeedAvailable: the planner has none.
            ForkError: the engine cannot be opened, or the planner cannot be asked.
        """
        self.engine()  # before a lease is asked for: without an engine it would be held for nothing
        self._deadline = time.monotonic() + self.settings.rfork_fork_timeout_sec
        self.times.outside["planner"] = "before"
        self._reserved = self._grant(fingerprint)

    def peek(self, fingerprint: str) -> Manifest:
        """The manifest of the reserved seed; a seed that gives none, or has another checkpoint, is exchanged.

        Raises:
            ForkError: no seed gave one; nothing is reserved any more.
        """
        while True:
            grant = self._reserved
            if grant is None:
                raise PlannerError("no seed is reserved")
            tally = _Tally(time.monotonic())
            self.times.outside["first metadata"] = "before"
            try:
                with self.times.stage("first metadata"):
                    manifest = background().call(
                        self._seeds.manifest(grant.lease.seed, self.seed_key, fingerprint),
                        self.settings.rfork_request_timeout_sec + 1.0,
                    )
                compare(self.checkpoint(), manifest.checkpoint, str(grant.lease.seed))
                return manifest
            except TimeoutError as error:
                self.give_back()
                raise ForkError("the background thread of this process does not answer", side="receiver") from error
            except ForkError as error:
                self._reserved = None
                self._end_grant(grant, tally, error)
                self._failed_with(grant, error)
                self._reserved = self._grant(fingerprint)

    def give_back(self) -> None:
        """Release what is reserved, unused; the seed is not to blame. Idempotent."""
        grant, self._reserved = self._reserved, None
        if grant is not None:
            self._end_grant(grant)

    def run(self, target: Target) -> Manifest:
        """Fork into the target's spans from the first seed that works, beginning with the one that is reserved.

        Raises:
            NoSeedAvailable: the planner has none.
            ForkError: the last seed's error; ``mutated`` where any attempt may have written.
        """
        engine = self.engine()
        # From here on again: what post-processing took between a reservation and now is not the fork's time.
        self._deadline = time.monotonic() + self.settings.rfork_fork_timeout_sec
        while True:
            grant, self._reserved = self._reserved, None
            if grant is None:
                grant = self._grant(target.local.fingerprint)
            tally = _Tally(time.monotonic())
            try:
                manifest = self._fork_once(engine, grant, target, tally)
            except BaseException as error:
                self._end_grant(grant, tally, error)
                if not isinstance(error, Exception):
                    raise
                if not isinstance(error, ForkError):
                    # Foreign code runs in a fork, and whatever it raises must end in a correct model.
                    text = f"unexpected {type(error).__name__}: {error}"
                    raise ForkError(text, mutated=True, side="receiver") from error
                self._failed_with(grant, error)
                continue
            tally.nbytes = manifest.nbytes
            self._end_grant(grant, tally)
            self.seed = grant.lease.seed
            return manifest

    def left_s(self) -> float:
        """Seconds that this fork may still take (``rfork_fork_timeout_sec``).

        Raises:
            ForkError: none.
        """
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            bound_s = self.settings.rfork_fork_timeout_sec
            raise ForkError(
                f"the fork took longer than {bound_s:g} s (rfork_fork_timeout_sec), the seed's state included"
            )
        return left_s

    def _grant(self, fingerprint: str) -> _Grant:
        """A lease that is being renewed.

        Raises:
            ForkError: there is none; where a seed has failed before, that seed's error, which is what a log should
                name.
        """
        last = self._last
        try:
            lease = self._acquire(fingerprint, self._failed)
        except ForkError as error:
            raise (self._after(last, error) if last else error) from error
        grant = _Grant(lease, LeaseKeeper(self._planner, lease))
        if last is not None and lease.seed in self._failed:
            # A planner that does not know RFORK-EXCLUDE gave the same seed again.
            self._end_grant(grant)
            raise last
        try:
            background().call(grant.keeper.start(), self.settings.rfork_request_timeout_sec)
        except TimeoutError as error:
            self._end_grant(grant)
            raise PlannerError("the background thread of this process does not answer") from error
        return grant

    def _failed_with(self, grant: _Grant, error: ForkError) -> None:
        """Remember the seed's failure and return where another may be asked for; raise ``error`` where not."""
        error.mutated = error.mutated or (self._last is not None and self._last.mutated)
        self._last = error
        self._failed.append(grant.lease.seed)
        if isinstance(error, SeedError) and error.other_fingerprint:  # a planner that does not compare them
            self._warn_of([OtherSeeds(error.other_fingerprint, 1, grant.lease.seed)])
        if not error.retry_elsewhere or len(self._failed) == MAX_SEEDS or time.monotonic() >= self._deadline:
            raise error
        logger.warning("seed %s failed (%s), asking for another", grant.lease.seed, self.told.once(error))

    def _end_grant(self, grant: _Grant, tally: _Tally | None = None, error: BaseException | None = None) -> None:
        """Stop renewing and release, in the background. Without a ``tally`` the lease was not used."""
        outcome: dict[str, Any] = {}
        if tally is not None:
            outcome = {
                "result": messages.RESULT_OK if error is None else messages.RESULT_FAILED,
                "nbytes": tally.nbytes,
                "seconds": time.monotonic() - tally.since,
                "lane": tally.lane,
            }
        if tally is not None and error is not None:
            # What no ForkError says went wrong in this process: the seed is not to blame.
            side = error.side if isinstance(error, ForkError) else "receiver"
            outcome |= {"cause": type(error).__name__, "side": side}
        background().spawn(self._released(grant, **outcome), "rfork-release")

    @staticmethod
    def _after(last: ForkError, error: ForkError) -> ForkError:
        """The seed's failure is what the log should name, not that there was no second seed."""
        return last if isinstance(error, NoSeedAvailable) or not last.mutated else _mutated(error)

    def _acquire(self, fingerprint: str, failed: list[SeedAddress]) -> Lease:
        wait_s = self.settings.rfork_seed_wait_sec
        question = Question(
            self._planner,
            self.seed_key,
            fingerprint,
            exclude=list(failed),
            intent=self.intent,
            labels=self.labels,
            wait_s=wait_s,
            waited_before_s=self._waited_s,
            until=max(self._deadline, time.monotonic() + (wait_s or 0.0)),
            given_up=self.given_up,
        )
        with self.times.stage("planner"):
            try:
                self._intent_stands = bool(self.intent)
                lease = question.lease()
                self._intent_stands = False
                return lease
            except NoSeedAvailable as error:
                if error.reason in ("", "fingerprint"):  # else seeds like this worker exist
                    self._warn_of(error.others)
                self._intent_stands = error.intent_granted or (question.left and bool(self.intent))
                if self._intent_stands:
                    keeping = self._keep_intent(fingerprint, stated=error.intent_granted)
                    self._intending = background().spawn(keeping, "rfork-intent")
                raise
            finally:
                self._waited_s += question.waited_s

    def _warn_of(self, others: Sequence[OtherSeeds]) -> None:
        """Have the log name what differs from these seeds, once and in the background."""
        if others and not self._warned_of_others:
            self._warned_of_others = True
            warning = warn_of_other_fingerprints(self._seeds, self.seed_key, self.facts, others)
            background().spawn(warning, "rfork-differing-facts")

    async def _keep_intent(self, fingerprint: str, *, stated: bool) -> None:
        """Renew "I am loading this from storage" until the announcement fulfils it or :meth:`close` ends it."""
        while True:
            if stated:
                await asyncio.sleep(INTENT_TTL_S / 3)
            stated = True
            try:
                await self._planner.intend(self.seed_key, self.intent, ttl_s=INTENT_TTL_S, fingerprint=fingerprint)
            except PlannerError as error:
                logger.debug("the intent could not be renewed: %s", error)

    def _fork_once(self, engine: TransferEngine, grant: _Grant, target: Target, tally: _Tally) -> Manifest:
        incoming = target.incoming()

        def progress(nbytes: int) -> None:
            tally.nbytes = nbytes
            target.progress(nbytes)

        def connected(lane: str) -> None:
            tally.lane = self.lane = lane

        try:
            if not engine.registered_nbytes:
                with self.times.stage("registration"):
                    bound_s = max(0.0, self._deadline - time.monotonic())
                    bounded(engine, "register", bound_s, lambda: engine.register(target.local.regions))
                self._registered = target.keep
            request = ForkRequest(
                local=target.local,
                engine=engine,
                seeds=self._seeds,
                request_timeout_s=self.settings.rfork_request_timeout_sec,
                timeout_s=max(0.0, self._deadline - time.monotonic()),
                max_batch_nbytes=self.settings.rfork_max_batch_bytes,
                progress=progress,
                connected=connected,
                first_write=self._first_write,
                arrived=incoming.arrived,
                untouched=target.untouched,
                checkpoint=self.checkpoint,
            )
            manifest = fork(request, grant.keeper, self.times)
            try:
                incoming.accept(manifest)
            except ForkError as error:
                error.mutated = True  # the bytes are there, and part of the state may be
                raise
            return manifest
        except EngineError as error:
            if error.in_flight:
                error.retry_elsewhere = False
                self._registered = None
                _close(engine, target.keep)
            raise
        finally:
            incoming.close()

    def _first_write(self) -> None:
        self.has_written = True

    async def _released(self, grant: _Grant, **outcome: Any) -> None:
        await grant.keeper.stop()  # first, so that no renewal follows the release
        try:
            await self._planner.release(grant.lease, **outcome)
        except PlannerError as error:
            logger.warning("the lease on seed %s could not be released: %s", grant.lease.seed, error)

    def hand_over_engine(self) -> TransferEngine:
        """The engine for the seed that this worker becomes: the open one, or a new one where that was closed.

        Raises:
            EngineError: it cannot be opened.
        """
        engine = self.engine()
        self._opening = concurrent.futures.Future()
        self._opening.set_exception(EngineError(self.engine_name, "open", "the engine now belongs to the seed"))
        self._registered = None
        return engine

    def reopen_engine(self) -> None:
        """Replace an engine that failed by a fresh one, so that this worker can still become a seed."""
        self.close_engine()
        self._opening = start_on_thread(self._open, "rfork-engine")

    def close_engine(self) -> None:
        """Close the engine and with it every registration; before the registered memory is let go. Idempotent.

        Never waits for an engine that is still being opened: that one is closed when it is open.
        """
        kept, self._registered = self._registered, None

        def close(opened: concurrent.futures.Future[TransferEngine]) -> None:
            if (error := opened.exception()) is not None:
                logger.debug("%s", error)
            else:
                _close(opened.result(), kept)

        self._opening.add_done_callback(close)  # at once, where it is done

    def let_go(self) -> bool:
        """Close the engine where it holds registrations, and say whether it did: the memory may be let go then."""
        held = self._registered is not None
        if held:
            self.close_engine()
        return held

    def forget_failures(self, error: BaseException) -> None:
        """Let go of the frames that this attempt's failures, ``error`` among them, came through.

        They hold the model and its tensors, and the same memory is about to be needed again.
        """
        failures: list[BaseException | None] = [error, self._last]
        self._last = None
        while failures:
            failure = failures.pop()
            if failure is not None and failure.__traceback__ is not None:
                failure.__traceback__ = None
                failures += [failure.__cause__, failure.__context__]

    def end_intent(self) -> None:
        """Stop renewing the intent; the announcement fulfils it, or it expires."""
        if self._intending is not None:
            try:
                self._intending.cancel(self.settings.rfork_request_timeout_sec)
            except TimeoutError as error:
                logger.debug("%s", error)
            self._intending = None

    def take_back_intent(self) -> None:
        """This worker will not be a seed: state no intent any more, and let nobody wait for it. Idempotent."""
        self.end_intent()
        intent, self.intent = self.intent, ""
        if self._intent_stands:
            self._intent_stands = False
            taking = background().spawn(self._taken_back(intent), "rfork-intent")
            with contextlib.suppress(TimeoutError):  # a process that is about to exit should have said it
                taking.wait(TAKE_BACK_S)

    async def _taken_back(self, intent: str) -> None:
        try:
            await self._planner.intend(self.seed_key, intent, ttl_s=0.0)
        except PlannerError as error:
            logger.debug("the intent could not be taken back, and expires: %s", error)

    def close(self) -> None:
        """This worker is no seed: close the engine, give back what is reserved, take the intent back. Idempotent."""
        self.give_back()
        self.take_back_intent()
        self.close_engine()


def _close(engine: TransferEngine, keep: Any) -> None:
    """Close ``engine``; where that fails, leave the buffers that it has registered to it for good."""
    try:
        engine.close()
    except EngineError as error:
        if keep is None:
            logger.debug("%s", error)
            return
        logger.warning("%s; its buffers stay allocated until this process ends", error)
        _given_up.append((engine, keep))


def _mutated(error: ForkError) -> ForkError:
    error.mutated = True
    return error
