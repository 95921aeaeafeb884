"""The reports of a worker's parts on what they did. Every function returns at once and raises nothing."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import ParamSpec

from prometheus_client import CollectorRegistry, generate_latest

from vllm_rfork.caches.manifest import LEVELS
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import CacheResults
from vllm_rfork.messages.cache_results import RESULTS
from vllm_rfork.messages.lanes import OTHER, lane_labels
from vllm_rfork.metrics import families
from vllm_rfork.metrics.families import FAILED, NONE, OK, SEED, SEED_STATES, STORAGE, Family
from vllm_rfork.metrics.files import ValueFiles
from vllm_rfork.metrics.front_end import directory
from vllm_rfork.metrics.values import Values

logger = worker_logger(__name__)

P = ParamSpec("P")


class _Process:
    """The values of this process, and their files."""

    def __init__(self) -> None:
        self.values = Values(self._write)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self.values)
        self._files: ValueFiles | None = None
        where = directory()
        if where is not None:
            try:
                self._files = ValueFiles(where)
            except (OSError, ValueError) as error:
                self._give_up(f"files in {where} cannot be written", error)
        self._begin()

    def _begin(self) -> None:
        """Begin the series of alerts at 0: if one began at 1, Prometheus would see no increase."""
        for reason in sorted(families.REASONS):
            self.values.add(families.FALLBACKS, reason, amount=0)
        for source in (SEED, STORAGE):
            self.values.add(families.LOADS, source, NONE, NONE, FAILED, amount=0)
        for family in (families.SERVED_BYTES, families.SERVED_FORKS, families.CACHE_SAVED, families.SAVED):
            self.values.add(family, amount=0)
        self.set_seed_state("none")

    def set_seed_state(self, present: str) -> None:
        for state in SEED_STATES:
            self.values.set(families.SEED_STATE, state, value=float(state == present))

    def _write(self, family: Family, sample: str, labels: dict[str, str], value: float) -> None:
        if self._files is None:
            return
        try:
            self._files.write(family, sample, labels, value)
        except (OSError, ValueError) as error:
            self.close()
            self._give_up("their files cannot be written any more", error)

    def close(self) -> None:
        """Keep the values in memory only from now on."""
        files, self._files = self._files, None
        if files is not None:
            files.close()

    def _give_up(self, problem: str, error: Exception) -> None:
        logger.warning(
            "vLLM's /metrics lacks this worker's metrics, which its seed service still shows: %s: %s", problem, error
        )


class _Present:
    lock = threading.Lock()
    process: _Process | None = None
    failed = False


def _process() -> _Process:
    with _Present.lock:
        if _Present.process is None:
            _Present.process = _Process()
        return _Present.process


def _begin_again() -> None:
    """Begin values of its own for a forked child: a thread that it does not have may hold the locks."""
    _Present.lock, _Present.process = threading.Lock(), None


os.register_at_fork(after_in_child=_begin_again)


def harmless(report: Callable[P, None]) -> Callable[P, None]:
    """Make ``report`` raise nothing; the first failure of this process is logged."""

    @functools.wraps(report)
    def reported(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            report(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - the outermost frame: a metric never fails a start
            if not _Present.failed:
                logger.warning("metrics are incomplete because of %s: %s", type(error).__name__, error)
            _Present.failed = True

    return reported


@harmless
def started(*, version: str, vllm_version: str, torch_version: str, device: str) -> None:
    """Begin the metrics of this worker."""
    _process().values.set(families.BUILD_INFO, version, vllm_version, torch_version, device, value=1.0)


@harmless
def loaded(source: str, *, nbytes: int, seconds: float, lane: str = "") -> None:
    """Count a load that succeeded.

    Args:
        source: :data:`families.SEED`, ``MEMORY`` or ``STORAGE``.
        nbytes, seconds: as in the log line of the load.
        lane: engine and lane, such as ``nixl/rdma``; empty if there was none.
    """
    labels, values = _lane(lane), _process().values
    values.add(families.LOADS, source, *labels, OK)
    values.add(families.READ_BYTES, source, *labels, amount=nbytes)
    values.observe(families.LOAD_SECONDS, source, value=seconds)


@harmless
def load_failed(source: str, lane: str = "") -> None:
    """Count a load that failed, by the lane that it had reached."""
    _process().values.add(families.LOADS, source, *_lane(lane), FAILED)


@harmless
def fell_back(reason: str) -> None:
    """Count a load from storage instead of a fork, by one of :data:`families.REASONS`."""
    _process().values.add(families.FALLBACKS, reason if reason in families.REASONS else OTHER)


@harmless
def stage_ended(stage: str, seconds: float) -> None:
    """Count one stage of a load. The caller's names of stages are a closed list."""
    _process().values.observe(families.STAGE_SECONDS, stage, value=seconds)


@harmless
def saved(seconds: float) -> None:
    """Count the seconds that a fork saved."""
    _process().values.add(families.SAVED, amount=max(0.0, seconds))


@harmless
def seed_state(state: str) -> None:
    """Set the state of this worker's seed, one of :data:`families.SEED_STATES`."""
    _process().set_seed_state(state)


@harmless
def served(forks: int, nbytes: int) -> None:
    """Count further forks from this worker's seed."""
    _process().values.add(families.SERVED_FORKS, amount=forks)
    _process().values.add(families.SERVED_BYTES, amount=nbytes)


@harmless
def caches(results: CacheResults) -> None:
    """Count the results of the caches of one start."""
    values = _process().values
    for kind, result in results.kinds.items():
        labels = kind if kind in LEVELS else OTHER, result if result in RESULTS else OTHER
        values.add(families.CACHES, *labels)
    values.add(families.CACHE_SAVED, amount=results.saved_s or 0.0)


def page() -> bytes:
    """The metrics of this process in Prometheus's text format."""
    return generate_latest(_process().registry)


def _lane(lane: str) -> tuple[str, str]:
    return lane_labels(lane) if lane else (NONE, NONE)
