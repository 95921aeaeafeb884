"""The series by key, with its model and strategy, computed at the time of the scrape.

Workers send the names of a key, and an older worker does not: a counter that was bound to its labels at its first
increase would be two series then. A key has exactly one series of each kind, with the names that are known now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_rfork.messages import MISSES
from vllm_rfork.messages.lanes import OTHER
from vllm_rfork.planner.metrics.series import PREFIX
from vllm_rfork.planner.store.base import Totals
from vllm_rfork.planner.store.key_use import UNNAMED, KeyNames

_NAMES = ("key", "model", "strategy")
_GAUGES = (
    ("slots", "slots", "Leases that the seeds accept at once"),
    ("leases", "leases", "Current leases"),
    ("waiting", "waiting", "Receivers in the queue"),
    ("intents", "intents", "Workers that load from storage and will be seeds"),
    ("oldest_wait_s", "oldest_wait_seconds", "Wait so far of the oldest receiver in the queue"),
)


class KeyCounts:
    """The counts of one key, or of all keys without series of their own.

    Attributes:
        misses: receivers sent to storage, by reason; begins with every reason at 0.
        totals: the fleet's, at the time of the scrape; None: the key has nothing in the fleet.
    """

    __slots__ = ("grants", "label", "misses", "names", "saved_s", "totals")

    def __init__(self, label: str) -> None:
        self.label = label
        self.names = UNNAMED
        self.grants = 0
        self.misses = dict.fromkeys(MISSES, 0)
        self.saved_s = 0.0
        self.totals: Totals | None = None

    def labels(self, *more: str) -> list[str]:
        """Return the values of the labels, and ``more`` of them."""
        return [self.label, *map(_text, self.names), *more]


class KeySeries(Collector):
    """Counts by key, for at most ``max_keys`` keys; the others share one key."""

    def __init__(self, max_keys: int) -> None:
        self._max_keys = max_keys
        self._by_key: dict[str, KeyCounts] = {}
        # Keys that differ only in what is not text share their series.
        self._by_label: dict[str, KeyCounts] = {}
        self._fleet: int | None = 0

    def of(self, key: str) -> KeyCounts:
        """Return the counts of ``key``, to add to."""
        counts = self._by_key.get(key)
        if counts is None:
            if len(self._by_key) >= self._max_keys:
                return self._with_label(OTHER)
            counts = self._by_key[key] = self._with_label(_text(key))
        return counts

    def _with_label(self, label: str) -> KeyCounts:
        counts = self._by_label.get(label)
        if counts is None:
            counts = self._by_label[label] = KeyCounts(label)
        return counts

    def update(self, totals: Mapping[str, Totals] | None, names_of: Callable[[str], KeyNames]) -> None:
        """Take over the fleet's ``totals`` and names. None: there are no gauges until they are known again."""
        for counts in self._by_label.values():
            counts.totals = None
        self._fleet = None if totals is None else len(totals)
        for key, each in (totals or {}).items():
            counts = self.of(key)
            if counts.totals is None:
                counts.totals = Totals()
            counts.totals.add(each)
        for key, counts in self._by_key.items():
            names = names_of(key)
            if names.model:  # a replica that leads no longer has none, and keeps those under which it counted
                counts.names = names

    def collect(self) -> Iterable[Metric]:
        """Yield all series for one scrape."""
        if self._fleet is not None:
            yield GaugeMetricFamily(f"{PREFIX}keys", "Known keys", value=self._fleet)
            yield from self._gauges()
        yield from self._counters()

    def _gauges(self) -> Iterable[Metric]:
        seeds = GaugeMetricFamily(f"{PREFIX}seeds", "Seeds by state", labels=[*_NAMES, "state"])
        gauges = [(field, GaugeMetricFamily(f"{PREFIX}{name}", help_, labels=_NAMES)) for field, name, help_ in _GAUGES]
        for counts in self._by_label.values():
            totals = counts.totals
            if totals is None:
                continue
            away = {"draining": totals.draining, "aside": totals.aside, "absent": totals.absent}
            for state, count in (*away.items(), ("serving", max(0, totals.seeds - sum(away.values())))):
                seeds.add_metric(counts.labels(state), count)
            for field, gauge in gauges:
                gauge.add_metric(counts.labels(), getattr(totals, field))
        yield seeds
        yield from (gauge for _, gauge in gauges)

    def _counters(self) -> Iterable[Metric]:
        grants = CounterMetricFamily(f"{PREFIX}grants", "Leases granted", labels=_NAMES)
        misses = CounterMetricFamily(
            f"{PREFIX}misses", "Receivers sent to storage, by reason", labels=[*_NAMES, "reason"]
        )
        saved = CounterMetricFamily(
            f"{PREFIX}saved_seconds", "By how much forks were shorter than a measured load from storage", labels=_NAMES
        )
        for counts in self._by_label.values():
            grants.add_metric(counts.labels(), counts.grants)
            saved.add_metric(counts.labels(), counts.saved_s)
            for reason, count in counts.misses.items():
                misses.add_metric(counts.labels(reason), count)
        yield from (grants, misses, saved)


def _text(value: str) -> str:
    """Return ``value`` as UTF-8 can have it: keys and names arrive as bytes."""
    return value.encode("utf-8", "replace").decode("utf-8")
