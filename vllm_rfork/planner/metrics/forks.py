"""Finished forks, as receivers report them."""

from __future__ import annotations

from vllm_rfork.messages.causes import CAUSES
from vllm_rfork.messages.lanes import OTHER, lane_labels
from vllm_rfork.planner.metrics.series import RATES, SLOW, Series
from vllm_rfork.planner.store.base import Outcome


class ForkMetrics:
    """Counts forks by result, engine, lane and cause."""

    def __init__(self, series: Series) -> None:
        self._holds = series.histogram("hold_seconds", "Time from grant to release", SLOW)
        self._seconds = series.histogram("fork_seconds", "Duration of forks, as reported by receivers", SLOW, "engine")
        self._rates = series.histogram(
            "fork_bytes_per_second",
            "Bytes divided by seconds of each successful fork that reported both",
            RATES,
            "engine",
        )
        self._forks = series.counter("forks", "Leases released by receivers, by reported result", "result")
        self._bytes = series.counter("fork_bytes", "Bytes that receivers reported")
        self._lane_forks = series.counter(
            "lane_forks", "Forks whose receiver reported a lane, by result", "engine", "lane", "result"
        )
        self._lane_bytes = series.counter("lane_bytes", "Bytes of the forks with reported seconds", "engine", "lane")
        self._lane_seconds = series.counter("lane_seconds", "Duration of these forks", "engine", "lane")
        self._failures = series.counter("fork_failures", "Failed forks, by class of the error", "cause")
        for result in ("ok", "failed", "released"):
            self._forks.labels(result)
        for cause in (*CAUSES, OTHER):
            self._failures.labels(cause)

    def released(self, held_s: float, outcome: Outcome | None) -> None:
        """Count a lease that its receiver released."""
        self._holds.observe(held_s)
        if outcome is None:
            self._forks.labels("released").inc()
            return
        result = "ok" if outcome.ok else "failed"
        self._forks.labels(result).inc()
        self._bytes.inc(outcome.nbytes)
        engine, lane = lane_labels(outcome.lane)
        if outcome.duration_s:
            self._seconds.labels(engine).observe(outcome.duration_s)
            if outcome.ok and outcome.nbytes:
                self._rates.labels(engine).observe(outcome.nbytes / outcome.duration_s)
        if outcome.lane:
            self._lane_forks.labels(engine, lane, result).inc()
            if outcome.duration_s:  # bytes without their seconds would make the rate of a lane wrong
                self._lane_bytes.labels(engine, lane).inc(outcome.nbytes)
                self._lane_seconds.labels(engine, lane).inc(outcome.duration_s)
        if not outcome.ok:
            self._failures.labels(outcome.cause if outcome.cause in CAUSES else OTHER).inc()
