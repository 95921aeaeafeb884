"""The values of one process's metrics, in memory; each change is passed on to files if there are any."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from vllm_rfork.metrics.families import FAMILIES, Family

#: Label values of one series, in the order of ``Family.labels``.
Labels = tuple[str, ...]


class Values(Collector):
    """All series of this process; methods may be called by several threads.

    Args:
        changed: called with the family, the name of the sample, its labels as a mapping, and its new value, while a
            lock is held. A histogram's buckets are passed on one by one, not cumulated.
    """

    def __init__(self, changed: Callable[[Family, str, dict[str, str], float], None]) -> None:
        self._lock = threading.Lock()
        self._changed = changed
        self._samples: dict[str, dict[tuple[str, Labels], float]] = {family.name: {} for family in FAMILIES}

    def add(self, family: Family, *labels: str, amount: float = 1.0) -> None:
        """Increase a counter. An amount of 0 makes the series exist."""
        with self._lock:
            self._increase(family, family.name, labels, amount)

    def set(self, family: Family, *labels: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._samples[family.name][family.name, labels] = value
            self._pass_on(family, family.name, labels, value)

    def observe(self, family: Family, *labels: str, value: float) -> None:
        """Add ``value`` to a histogram."""
        with self._lock:
            bounds = (*family.buckets, float("inf"))
            reached = bisect_left(bounds, value)
            for number, bound in enumerate(bounds):
                counted = 1.0 if number == reached else 0.0
                self._increase(family, f"{family.name}_bucket", (*labels, _text(bound)), counted)
            self._increase(family, f"{family.name}_sum", labels, value)

    def collect(self) -> Iterable[Metric]:
        """The families that have series, as ``prometheus_client`` writes them out."""
        with self._lock:
            samples = {name: dict(of_family) for name, of_family in self._samples.items() if of_family}
        for family in FAMILIES:
            if family.name in samples:
                yield _metric(family, samples[family.name])

    def _increase(self, family: Family, sample: str, labels: Labels, amount: float) -> None:
        samples = self._samples[family.name]
        value = samples[sample, labels] = samples.get((sample, labels), 0.0) + amount
        self._pass_on(family, sample, labels, value)

    def _pass_on(self, family: Family, sample: str, labels: Labels, value: float) -> None:
        self._changed(family, sample, _named(family, labels), value)


def _text(bound: float) -> str:
    text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
    return text


def _named(family: Family, labels: Labels) -> dict[str, str]:
    """Labels as a mapping; those of a bucket have its bound as the last one."""
    return dict(zip((*family.labels, "le"), labels, strict=False))


def _metric(family: Family, samples: dict[tuple[str, Labels], float]) -> Metric:
    metric = Metric(family.name.removesuffix("_total"), family.help, family.kind)
    reached: dict[Labels, float] = {}
    for (name, labels), value in samples.items():
        if name.endswith("_bucket"):  # in ascending order for each series, as :meth:`Values.observe` adds them
            reached[labels[:-1]] = reached.get(labels[:-1], 0.0) + value
            metric.add_sample(name, _named(family, labels), reached[labels[:-1]])
        else:
            metric.add_sample(name, _named(family, labels), value)
    for labels, count in reached.items():
        metric.add_sample(f"{family.name}_count", _named(family, labels), count)
    return metric
