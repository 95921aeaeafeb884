"""Prometheus metrics of the planner, in a registry of their own, with a bounded number of labels.

Only the first ``max_keys`` keys have series of their own; all others share the key ``(other)``, as do lanes that are
not in ``messages/lanes.py``. Gauges over the fleet are computed at the time of the scrape. Of several replicas only the
leader has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_rfork.caches.manifest import LEVELS
from vllm_rfork.messages.cache_results import RESULTS
from vllm_rfork.messages.causes import CAUSES
from vllm_rfork.messages.lanes import OTHER, lane_labels
from vllm_rfork.planner.store.base import Event, Outcome, Totals

# Without this, each counter has a second series "..._created", which doubles the page and which nobody uses.
disable_created_metrics()  # type: ignore[no-untyped-call]

#: Reasons to refuse a call.
_REFUSALS = ("token", "address", "limit")
_REASONS = frozenset({"stale", "withdrawn", "rekeyed", "new epoch", "new fingerprint"})
_PREFIX = "rfork_planner_"
_QUICK = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_SLOW = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """The planner's counters and gauges, and the page for Prometheus."""

    def __init__(self, max_keys: int) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._max_keys = max_keys
        self._keys: dict[str, str] = {}
        # A look-up of a series by its labels costs as much as the decision that is counted: keep the busy ones.
        self._by_answer: dict[tuple[str, int], Counter] = {}
        self._by_call: dict[str, Histogram] = {}
        self._grants_of: dict[str, Counter] = {}
        self._fleet = _Fleet()
        self.registry.register(self._fleet)
        self._requests = self._counter("requests", "Answers, by call and status", "call", "code")
        self._durations = self._histogram("request_seconds", "Time per call, without waits", _QUICK, "call")
        self._grants = self._counter("grants", "Leases granted", "key")
        self._misses = self._counter("misses", "Receivers sent to storage, by reason", "key", "reason")
        self._waits = self._histogram("wait_seconds", "Time that receivers waited for a seed", _SLOW, "result")
        self._holds = self._histogram("hold_seconds", "Time from grant to release", _SLOW)
        self._fork_seconds = self._histogram("fork_seconds", "Duration of forks, as reported by receivers", _SLOW)
        self._forks = self._counter("forks", "Leases released by receivers, by reported result", "result")
        self._bytes = self._counter("fork_bytes", "Bytes that receivers reported")
        self._lane_forks = self._counter(
            "lane_forks", "Forks whose receiver reported a lane, by result", "engine", "lane", "result"
        )
        self._lane_bytes = self._counter("lane_bytes", "Bytes of the forks with reported seconds", "engine", "lane")
        self._lane_seconds = self._counter("lane_seconds", "Duration of these forks", "engine", "lane")
        self._caches = self._counter("caches", "Caches of seeds that starts used or missed", "kind", "result")
        self._cache_saved = self._counter("cache_saved_seconds", "Seconds that caches of seeds saved")
        self._failures = self._counter("fork_failures", "Failed forks, by class of the error", "cause")
        self._dropped = self._counter("seeds_dropped", "Seeds dropped, by reason", "reason")
        self._events = self._counter("events", "Events of the store, by kind", "kind")
        self._refused = self._counter("refused", "Refused calls, by reason", "reason")
        # Series for alerts begin at 0: if one began at 1, Prometheus would see no increase.
        for cause in (*CAUSES, OTHER):
            self._failures.labels(cause)
        for reason in _REFUSALS:
            self._refused.labels(reason)
        for kind in ("lease_expired", "seed_absent", "seed_aside", "state_lost"):
            self._events.labels(kind)
        self._store_up = Gauge(
            f"{_PREFIX}store_up", "1 while this replica decides, otherwise 0", registry=self.registry
        )
        self.open_waits = Gauge(f"{_PREFIX}held_requests", "Requests that wait in this process", registry=self.registry)
        self.presence = Gauge(
            f"{_PREFIX}presence_connections", "Presence connections of seeds to this process", registry=self.registry
        )

    def request(self, call: str, code: int, duration_s: float | None) -> None:
        """Count an answered call; ``duration_s`` is None if it waited for a seed."""
        count = self._by_answer.get((call, code))
        if count is None:
            count = self._by_answer[call, code] = self._requests.labels(call, str(code))
        count.inc()
        if duration_s is not None:
            duration = self._by_call.get(call)
            if duration is None:
                duration = self._by_call[call] = self._durations.labels(call)
            duration.observe(duration_s)

    def granted(self, key: str, waited_s: float | None) -> None:
        """Count a lease that was granted, after a wait or at once (None)."""
        label = self._key(key)
        count = self._grants_of.get(label)
        if count is None:
            count = self._grants_of[label] = self._grants.labels(label)
        count.inc()
        if waited_s is not None:
            self._waits.labels("granted").observe(waited_s)

    def missed(self, key: str, reason: str, waited_s: float | None) -> None:
        """Count a receiver that was sent to storage, after a wait or at once (None)."""
        self._misses.labels(self._key(key), reason or "unknown").inc()
        if waited_s is not None:
            self._waits.labels("missed").observe(waited_s)

    def released(self, held_s: float, outcome: Outcome | None) -> None:
        """Count a lease that its receiver released."""
        self._holds.observe(held_s)
        if outcome is not None and outcome.duration_s:
            self._fork_seconds.observe(outcome.duration_s)
        if outcome is None:
            self._forks.labels("released").inc()
            return
        result = "ok" if outcome.ok else "failed"
        self._forks.labels(result).inc()
        self._bytes.inc(outcome.nbytes)
        if outcome.lane:
            labels = lane_labels(outcome.lane)
            self._lane_forks.labels(*labels, result).inc()
            if outcome.duration_s:  # bytes without their seconds would make the rate of a lane wrong
                self._lane_bytes.labels(*labels).inc(outcome.nbytes)
                self._lane_seconds.labels(*labels).inc(outcome.duration_s)
        if not outcome.ok:
            self._failures.labels(outcome.cause if outcome.cause in CAUSES else OTHER).inc()

    def refused(self, reason: str) -> None:
        """Count a refused call: ``token``, ``address`` or ``limit``."""
        self._refused.labels(reason).inc()

    def event(self, event: Event) -> None:
        """Count an event of the store; forks are counted by :meth:`released`."""
        if event.kind in ("fork_ok", "fork_failed"):
            return
        self._events.labels(event.kind).inc()
        if event.kind == "caches_reported":
            self._cached(**event.facts)
        if event.kind == "seed_dropped":
            self._dropped.labels(event.detail if event.detail in _REASONS else OTHER).inc()

    def _cached(self, kinds: Mapping[str, str], saved_s: float | None) -> None:
        for kind, result in kinds.items():
            self._caches.labels(kind if kind in LEVELS else OTHER, result if result in RESULTS else OTHER).inc()
        self._cache_saved.inc(saved_s or 0.0)

    def page(self, totals: Mapping[str, Totals] | None) -> bytes:
        """Return the metrics in Prometheus's text format, with the fleet's ``totals``.

        None: the store is unavailable. ``store_up`` is 0 then, and the fleet has no gauges: old or zero ones would be
        wrong.
        """
        self._store_up.set(totals is not None)
        if totals is None:
            self._fleet.shown = None
            return generate_latest(self.registry)
        shown: dict[str, Totals] = {}
        for key, each in totals.items():
            shown.setdefault(self._key(key), Totals()).add(each)
        self._fleet.shown, self._fleet.keys = shown, len(totals)
        return generate_latest(self.registry)

    def _key(self, key: str) -> str:
        label = self._keys.get(key)
        if label is None:
            if len(self._keys) >= self._max_keys:
                return OTHER
            label = self._keys[key] = key.encode("utf-8", "replace").decode("utf-8")
        return label

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}{name}", help_, labels, registry=self.registry)

    def _histogram(self, name: str, help_: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", help_, labels, registry=self.registry, buckets=tuple(buckets))


class _Fleet(Collector):
    """The fleet's gauges, from the latest totals; none while those are None."""

    def __init__(self) -> None:
        self.shown: Mapping[str, Totals] | None = {}
        self.keys = 0

    def collect(self) -> Iterable[Metric]:
        if self.shown is None:
            return
        yield GaugeMetricFamily(f"{_PREFIX}keys", "Known keys", value=self.keys)
        seeds = GaugeMetricFamily(f"{_PREFIX}seeds", "Seeds by state", labels=["key", "state"])
        gauges = {
            name: GaugeMetricFamily(f"{_PREFIX}{shown}", help_, labels=["key"])
            for name, shown, help_ in (
                ("slots", "slots", "Leases that the seeds accept at once"),
                ("leases", "leases", "Current leases"),
                ("waiting", "waiting", "Receivers in the queue"),
                ("intents", "intents", "Workers that load from storage and will be seeds"),
                ("oldest_wait_s", "oldest_wait_seconds", "Wait so far of the oldest receiver in the queue"),
            )
        }
        for key, each in self.shown.items():
            seeds.add_metric([key, "draining"], each.draining)
            seeds.add_metric([key, "aside"], each.aside)
            seeds.add_metric([key, "absent"], each.absent)
            seeds.add_metric([key, "serving"], max(0, each.seeds - each.draining - each.aside - each.absent))
            for name, gauge in gauges.items():
                gauge.add_metric([key], getattr(each, name))
        yield seeds
        yield from gauges.values()
