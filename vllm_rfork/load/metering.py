"""The reports of loads and reloads to the metrics of their worker, and to vLLM's trace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vllm_rfork.errors import ForkError, NoSeedAvailable
from vllm_rfork.fork.session import ForkSession
from vllm_rfork.fork.stage_times import STAGES
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages.lanes import OTHER
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.metrics.families import INELIGIBLE, MEMORY, SEED, STORAGE
from vllm_rfork.vllm_compat.telemetry import trace_load

logger = worker_logger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights of a model, their source, and the seconds that it took, as in the log line of the load."""

    source: str
    nbytes: int
    seconds: float


class LoadMeter:
    """The report of one load; made when the load begins.

    Args:
        ineligible: this worker cannot fork this model.
    """

    def __init__(self, session: ForkSession, *, ineligible: bool) -> None:
        self._session, self._ineligible = session, ineligible
        self._began, self._began_ns = time.perf_counter(), time.time_ns()
        self._reason = ""

    @metrics.harmless
    def fell_back(self, error: ForkError) -> None:
        """Report that storage is read instead of a seed because of ``error``."""
        self._count_fallback(INELIGIBLE if self._ineligible else reason_of(error))
        if self._session.leased:
            metrics.load_failed(SEED, self._session.lane)

    @metrics.harmless
    def not_eligible(self) -> None:
        """Report that no seed was asked for, because this worker cannot fork."""
        self._count_fallback(INELIGIBLE)

    @metrics.harmless
    def storage_failed(self) -> None:
        """Report that the load from storage failed, and with it the load."""
        metrics.load_failed(STORAGE)
        self._trace(STORAGE, 0)

    @metrics.harmless
    def ended(self, weights: Weights | None) -> None:
        """Report the load of ``weights``, which vLLM has post-processed."""
        if weights is None:
            return
        session = self._session
        forked = weights.source == SEED
        lane = session.lane if forked else ""
        metrics.loaded(weights.source, nbytes=weights.nbytes, seconds=weights.seconds, lane=lane)
        for stage, seconds in session.times.seconds.items():
            metrics.stage_ended(stage if stage in STAGES else OTHER, seconds)
        if forked and session.storage_s is not None:
            # The planner measures a load from its first question to the seed that the worker becomes. The nearest here
            # is the whole load, with a wait for the seed and vLLM's post-processing.
            metrics.saved(session.storage_s - (time.perf_counter() - self._began))
        self._trace(weights.source, weights.nbytes)

    def _count_fallback(self, reason: str) -> None:
        self._reason = reason
        metrics.fell_back(reason)

    def _trace(self, source: str, nbytes: int) -> None:
        session = self._session
        attributes: dict[str, str | int] = {"rfork.source": source, "rfork.bytes": nbytes}
        if source == SEED:
            attributes |= {"rfork.engine": session.engine, "rfork.lane": session.lane, "rfork.seed": str(session.seed)}
        elif self._reason:
            attributes["rfork.fallback_reason"] = self._reason
        stages = [(f"rfork.{name.replace(' ', '_')}", began, ended) for name, began, ended in session.times.intervals]
        trace_load(("rfork.load", self._began_ns, time.time_ns()), stages, attributes)


@metrics.harmless
def reload_forked(session: ForkSession, nbytes: int, seconds: float) -> None:
    """Report a reload of a running model that read ``nbytes`` from a seed; 0 if its memory had all of them already."""
    metrics.loaded(SEED if nbytes else MEMORY, nbytes=nbytes, seconds=seconds, lane=session.lane if nbytes else "")


@metrics.harmless
def reload_fell_back(error: Exception, failed: ForkSession | None) -> None:
    """Report that a reload reads storage because of ``error``. ``failed``: the session of a fork that failed."""
    metrics.fell_back(reason_of(error))
    if failed is not None and failed.leased:
        metrics.load_failed(SEED, failed.lane)


def reason_of(error: Exception) -> str:
    """The reason in metrics for a load from storage because of ``error``."""
    return (error.reason if isinstance(error, NoSeedAvailable) else "") or type(error).__name__


def whole(load: Callable[[], nn.Module]) -> tuple[nn.Module, Weights]:
    """The model that ``load``, of a loader that builds and fills it in one go, returns from storage.

    0 bytes are reported of a model whose bytes cannot be counted.
    """
    started = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - started
    try:
        nbytes = model_nbytes(model)
    except Exception as error:  # noqa: BLE001 - any loader's model, which may have parameters without a size
        logger.debug("the model's bytes are not counted because of %s: %s", type(error).__name__, error)
        nbytes = 0
    return model, Weights(STORAGE, nbytes, seconds)


def without_fork(load: Callable[[], nn.Module], reason: str) -> nn.Module:
    """As :func:`whole`, for a worker that takes no part in forking because of ``reason``; reports the load."""
    metrics.fell_back(reason)
    try:
        model, weights = whole(load)
    except BaseException:
        metrics.load_failed(STORAGE)
        raise
    metrics.loaded(STORAGE, nbytes=weights.nbytes, seconds=weights.seconds)
    return model


def model_nbytes(model: nn.Module) -> int:
    """Bytes of the parameters of ``model``."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
