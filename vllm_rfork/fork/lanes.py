"""The choice of a lane: the first engine, in the receiver's order, whose connection to the seed succeeds.

No byte moves before a lane is chosen, so a refused or failed connection costs only time, and the next engine is tried.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.engines.registry import engine_class
from vllm_rfork.errors import EngineError, ForkError, RForkError, SeedError, Side
from vllm_rfork.fork.engine_handle import EngineHandle, EngineHangs, call_engine
from vllm_rfork.fork.engine_set import Candidate, EngineSet
from vllm_rfork.fork.stage_times import StageTimes
from vllm_rfork.logs.worker import LoggedTexts, worker_logger
from vllm_rfork.manifest.schema import Manifest, Region

logger = worker_logger(__name__)

#: All connections to one seed together may take as many times the bound of one. Without it, a seed that cannot be
#: reached would cost more with every engine.
CONNECTION_BOUNDS = 2


@dataclass(frozen=True)
class Lane:
    """A connection to a seed's engine; ``name`` is ``engine/lane``."""

    handle: EngineHandle
    engine: TransferEngine
    endpoint: str
    name: str


@dataclass(frozen=True)
class Receiver:
    """The receiver's side of a connection.

    Attributes:
        regions: what each engine registers.
        memory: keeps the regions alive while they are registered.
        request_timeout_s: bound of one connection.
        deadline: of the whole transfer, by ``time.monotonic``.
        logged: the texts that this load has logged already.
    """

    engines: EngineSet
    regions: Sequence[Region]
    memory: Any
    request_timeout_s: float
    deadline: float
    logged: LoggedTexts


def connect(receiver: Receiver, remote: Manifest, seed: str, lease: str, times: StageTimes) -> Lane:
    """Connect to ``seed`` by the first engine that can.

    Args:
        seed: its address, for messages.
        lease: the id of the lease, for two-sided engines.

    Raises:
        SeedError: the seed and this worker have no engine in common.
        EngineError: no engine connects; with several, the text names each lane with its reason. ``in_flight`` if an
            engine reports that bytes may arrive: then no other lane was tried.
    """
    candidates = _common(receiver.engines, remote, seed)
    search = _Search(receiver, seed, lease, times)
    lane = search.first(candidates)
    if lane is None:
        raise _summary(search.failures, receiver.engines, remote)
    return lane


def check_offer(engines: EngineSet, remote: Manifest, seed: str) -> None:
    """Check that a lane to ``seed`` may exist, without opening an engine.

    Raises:
        SeedError: the seed and this worker have no engine in common.
        EngineError: each engine in common finds an obstacle, or could not be opened.
    """
    candidates = _common(engines, remote, seed)
    obstacles = [obstacle for each in candidates if (obstacle := _obstacle(engines, each)) is not None]
    if len(obstacles) == len(candidates):
        raise _summary(obstacles, engines, remote)


def _common(engines: EngineSet, remote: Manifest, seed: str) -> list[Candidate]:
    if candidates := engines.offered_by(remote):
        return candidates
    theirs, ours = ", ".join(each.engine for each in remote.endpoints), ", ".join(engines.order)
    raise SeedError(
        f"seed {seed} transfers with engine {theirs}, this worker with {ours}; "
        "set rfork_engine so that both have one in common",
        side="receiver",  # the settings differ; the seed may serve others
    )


def _obstacle(engines: EngineSet, candidate: Candidate) -> EngineError | None:
    """The failure to open the engine, if there was one, or what it finds without being opened."""
    name = candidate.handle.name
    if (failed := candidate.handle.failure()) is not None:
        return failed
    try:
        engine = engine_class(name)
    except RForkError:
        return None  # the adapter cannot be imported; opening it reports that
    try:
        found = engine.lane_obstacle(candidate.endpoint, engines.config)
    except EngineError as error:
        return error
    except Exception as error:  # noqa: BLE001 - engines of other distributions may raise anything
        found = f"lane_obstacle raised {type(error).__name__}: {error}"
    if found is None:
        return None
    return EngineError(name, "connect", found, code="lane", retry_elsewhere=True, side="receiver")


class _Search:
    def __init__(self, receiver: Receiver, seed: str, lease: str, times: StageTimes) -> None:
        self._receiver, self._seed, self._lease, self._times = receiver, seed, lease, times
        self._connecting_s = CONNECTION_BOUNDS * receiver.request_timeout_s  # left for connections to this seed
        self.failures: list[EngineError] = []

    def first(self, candidates: Sequence[Candidate]) -> Lane | None:
        """The lane of the first candidate that connects; obstacles that are known at once go first."""
        possible = []
        for candidate in candidates:
            obstacle = _obstacle(self._receiver.engines, candidate)
            if obstacle is None:
                possible.append(candidate)
            else:
                self._note(obstacle, log=len(candidates) > 1)
        for number, candidate in enumerate(possible, start=1):
            try:
                lane = self._connected(candidate, last=number == len(possible))
                candidate.handle.doubtful = False
                return lane
            except EngineError as error:
                candidate.handle.doubtful = error.code != "lane" and error.side != "seed"
                self._give_up(candidate, error)
                self._note(error, log=len(candidates) > 1)
                if candidate.handle.is_opening():
                    # It hangs. The rest opens at the same time, so that engines that hang cost two bounds together.
                    for other in possible[number:]:
                        other.handle.start_opening()
        return None

    def _connected(self, candidate: Candidate, *, last: bool) -> Lane:
        handle, endpoint = candidate.handle, candidate.endpoint
        left_s = self._left_s()
        with self._times.stage("engine wait"):
            engine = handle.opened(left_s)
        left_s = self._left_s()
        with self._times.stage("registration"):
            handle.register(
                self._receiver.regions,
                self._receiver.memory,
                left_s if last else min(left_s, self._receiver.engines.config.timeout_s),
            )
        bound_s = min(
            self._receiver.request_timeout_s, self._left_s(), self._connecting_s if last else self._connecting_s / 2
        )

        def connect() -> str:
            engine.present_lease(self._lease)
            engine.connect(endpoint, bound_s)
            return engine.lane(endpoint)

        started = time.monotonic()
        try:
            with self._times.stage("connect"):
                name = call_engine(engine, "connect", bound_s, connect)
        finally:
            self._connecting_s -= min(time.monotonic() - started, bound_s)
        self._times.seconds["engine"], self._times.outside["engine"] = handle.opening_s, "overlapped"
        return Lane(handle, engine, endpoint, name)

    def _left_s(self) -> float:
        left_s = self._receiver.deadline - time.monotonic()
        if left_s <= 0:
            tried = "; ".join(str(error) for error in self.failures)
            raise ForkError(
                "the fork took longer than rfork_fork_timeout_sec before a lane was found" + (tried and f" ({tried})")
            )
        return left_s

    def _give_up(self, candidate: Candidate, error: EngineError) -> None:
        """Give an engine up if its call goes on; no read has begun, so the next engine may use the same memory.

        Raises:
            EngineError: ``error``, if the engine reports that bytes may arrive nevertheless.
        """
        # A registration that goes on holds the memory, and writes nothing to it.
        if isinstance(error, EngineHangs) or (error.in_flight and error.operation == "register"):
            candidate.handle.abandon(self._receiver.memory, hangs=True)
        elif error.in_flight:
            candidate.handle.abandon(self._receiver.memory)
            error.retry_elsewhere = False
            raise error

    def _note(self, error: EngineError, *, log: bool) -> None:
        self.failures.append(error)
        if error.operation == "open":
            self._receiver.engines.report_failure(error)
        elif log:
            logger.info("seed %s is not read this way: %s", self._seed, self._receiver.logged.once(error))


def _summary(failures: Sequence[EngineError], engines: EngineSet, remote: Manifest) -> EngineError:
    """The error of a seed to which no engine connects: the only one's own, or one with all texts."""
    # Another seed may be where one of the engines works, or offer one that this seed lacks.
    elsewhere = any(error.retry_elsewhere for error in failures) or bool(engines.usable_beside(remote))
    if len(failures) == 1:
        failures[0].retry_elsewhere = elsewhere
        return failures[0]
    sides: set[Side] = {error.side for error in failures}
    return EngineError(
        ", ".join(error.engine for error in failures),
        "connect",
        "; ".join(str(error) for error in failures),
        code="lane" if all(error.code == "lane" for error in failures) else "",
        retry_elsewhere=elsewhere,
        side=sides.pop() if len(sides) == 1 else "unknown",
    )
