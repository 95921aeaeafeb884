"""The calls of the store: how long they take, and why they are declined."""

from __future__ import annotations

from prometheus_client import Histogram

from vllm_rfork.planner.metrics.series import QUICK, Series
from vllm_rfork.planner.store.errors import FENCED, NOT_LEADER, UNREACHABLE


class StoreMetrics:
    """The meter of ``store/timed.py``."""

    def __init__(self, series: Series) -> None:
        self._seconds = series.histogram(
            "store_seconds", "Time of a call of the store, by operation", QUICK, "operation"
        )
        self._errors = series.counter("store_errors", "Calls that the store declined, by reason", "reason")
        # A look-up of a series by its labels costs as much as the decision that is measured.
        self._by_operation: dict[str, Histogram] = {}
        for reason in (UNREACHABLE, NOT_LEADER, FENCED):
            self._errors.labels(reason)

    def measured(self, operation: str, duration_s: float) -> None:
        """Note that a call of the port's method ``operation`` took ``duration_s``."""
        seconds = self._by_operation.get(operation)
        if seconds is None:
            seconds = self._by_operation[operation] = self._seconds.labels(operation)
        seconds.observe(duration_s)

    def unavailable(self, reason: str) -> None:
        """Note that a call was declined for ``reason``."""
        self._errors.labels(reason).inc()
