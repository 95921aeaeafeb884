"""Prometheus metrics of the planner, in a registry of their own, with a bounded number of labels.

Only the first ``max_keys`` keys have series of their own; all others share the key ``(other)``, as do lanes that are
not in ``messages/lanes.py``. Gauges over the fleet are computed at the time of the scrape. Of several replicas only the
leader has them.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Histogram, ProcessCollector, generate_latest

from vllm_rfork import __version__
from vllm_rfork.caches.manifest import LEVELS
from vllm_rfork.messages.cache_results import RESULTS
from vllm_rfork.messages.causes import CAUSES
from vllm_rfork.messages.lanes import OTHER, lane_labels
from vllm_rfork.planner.metrics.fleet import FleetGauges
from vllm_rfork.planner.metrics.series import QUICK, SLOW, Series
from vllm_rfork.planner.metrics.store import StoreMetrics
from vllm_rfork.planner.store.base import Event, Outcome, Totals

#: Reasons to refuse a call.
_REFUSALS = ("token", "address", "limit")
_REASONS = frozenset({"stale", "withdrawn", "rekeyed", "new epoch", "new fingerprint"})


class Metrics:
    """The planner's counters and gauges, and the page for Prometheus."""

    def __init__(self, max_keys: int) -> None:
        series = Series()
        self.registry = series.registry
        self._max_keys = max_keys
        self._keys: dict[str, str] = {}
        # A look-up of a series by its labels costs as much as the decision that is counted: keep the busy ones.
        self._by_answer: dict[tuple[str, int], Counter] = {}
        self._by_call: dict[str, Histogram] = {}
        self._grants_of: dict[str, Counter] = {}
        self._fleet = FleetGauges()
        self.registry.register(self._fleet)
        self._requests = series.counter("requests", "Answers, by call and status", "call", "code")
        self._durations = series.histogram("request_seconds", "Time per call, without waits", QUICK, "call")
        self._grants = series.counter("grants", "Leases granted", "key")
        self._misses = series.counter("misses", "Receivers sent to storage, by reason", "key", "reason")
        self._waits = series.histogram("wait_seconds", "Time that receivers waited for a seed", SLOW, "result")
        self._holds = series.histogram("hold_seconds", "Time from grant to release", SLOW)
        self._fork_seconds = series.histogram("fork_seconds", "Duration of forks, as reported by receivers", SLOW)
        self._forks = series.counter("forks", "Leases released by receivers, by reported result", "result")
        self._bytes = series.counter("fork_bytes", "Bytes that receivers reported")
        self._lane_forks = series.counter(
            "lane_forks", "Forks whose receiver reported a lane, by result", "engine", "lane", "result"
        )
        self._lane_bytes = series.counter("lane_bytes", "Bytes of the forks with reported seconds", "engine", "lane")
        self._lane_seconds = series.counter("lane_seconds", "Duration of these forks", "engine", "lane")
        self._caches = series.counter("caches", "Caches of seeds that starts used or missed", "kind", "result")
        self._cache_saved = series.counter("cache_saved_seconds", "Seconds that caches of seeds saved")
        self._failures = series.counter("fork_failures", "Failed forks, by class of the error", "cause")
        self._dropped = series.counter("seeds_dropped", "Seeds dropped, by reason", "reason")
        self._events = series.counter("events", "Events of the store, by kind", "kind")
        self._refused = series.counter("refused", "Refused calls, by reason", "reason")
        # Series for alerts begin at 0: if one began at 1, Prometheus would see no increase.
        for cause in (*CAUSES, OTHER):
            self._failures.labels(cause)
        for reason in _REFUSALS:
            self._refused.labels(reason)
        for kind in ("lease_expired", "seed_absent", "seed_aside", "state_lost"):
            self._events.labels(kind)
        self._store_up = series.gauge("store_up", "1 while this replica decides, otherwise 0")
        self._leader = series.gauge("leader", "1 on the replica that leads, otherwise 0")
        self.open_waits = series.gauge("held_requests", "Requests that wait in this process")
        self.presence = series.gauge("presence_connections", "Presence connections of seeds to this process")
        series.gauge("build_info", "1, with the version of the planner", "version").labels(__version__).set(1)
        self.store = StoreMetrics(series)
        ProcessCollector(registry=self.registry)

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
        self._leader.set(totals is not None)
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
