"""The making of metrics in one registry, and their common prefix and buckets."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

# Without this, each counter has a second series "..._created", which doubles the page and which nobody uses.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "rfork_planner_"
#: Buckets in seconds: of decisions, and of everything that takes as long as weights do.
QUICK = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
SLOW = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)
#: Buckets in bytes per second, of single forks.
RATES = (1e8, 2.5e8, 5e8, 1e9, 2.5e9, 5e9, 1e10, 2.5e10, 5e10, 1e11, 2e11, 4e11)


class Series:
    """Makes the metrics of one registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)

    def counter(self, name: str, help_: str, *labels: str) -> Counter:
        """Make a counter; its series end with ``_total``."""
        return Counter(f"{PREFIX}{name}", help_, labels, registry=self.registry)

    def gauge(self, name: str, help_: str, *labels: str) -> Gauge:
        """Make a gauge."""
        return Gauge(f"{PREFIX}{name}", help_, labels, registry=self.registry)

    def histogram(self, name: str, help_: str, buckets: Iterable[float], *labels: str) -> Histogram:
        """Make a histogram with these upper bounds."""
        return Histogram(f"{PREFIX}{name}", help_, labels, registry=self.registry, buckets=tuple(buckets))
