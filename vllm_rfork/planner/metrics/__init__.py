"""Prometheus metrics of the planner, in a registry of their own, with a bounded number of labels.

Only the first ``max_keys`` keys have series of their own; all others share the key ``(other)``, as do lanes that are
not in ``messages/lanes.py``. Gauges over the fleet are computed at the time of the scrape. Of several replicas only the
leader has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import Counter, Histogram, ProcessCollector, generate_latest

from vllm_rfork import __version__
from vllm_rfork.caches.manifest import LEVELS
from vllm_rfork.messages.cache_results import RESULTS
from vllm_rfork.messages.lanes import OTHER
from vllm_rfork.planner.metrics.forks import ForkMetrics
from vllm_rfork.planner.metrics.keys import KeySeries
from vllm_rfork.planner.metrics.series import QUICK, SLOW, Series
from vllm_rfork.planner.metrics.store import StoreMetrics
from vllm_rfork.planner.store.base import Event, Outcome, Released, Totals
from vllm_rfork.planner.store.key_use import UNNAMED, KeyNames

#: Reasons to refuse a call.
_REFUSALS = ("token", "address", "limit")
_REASONS = frozenset({"stale", "withdrawn", "rekeyed", "new epoch", "new fingerprint"})


class Metrics:
    """The planner's counters and gauges, and the page for Prometheus."""

    def __init__(self, max_keys: int) -> None:
        series = Series()
        self.registry = series.registry
        # A look-up of a series by its labels costs as much as the decision that is counted: keep the busy ones.
        self._by_answer: dict[tuple[str, int], Counter] = {}
        self._by_call: dict[str, Histogram] = {}
        self._keys = KeySeries(max_keys)
        self.registry.register(self._keys)
        self._requests = series.counter("requests", "Answers, by call and status", "call", "code")
        self._durations = series.histogram("request_seconds", "Time per call, without waits", QUICK, "call")
        self._waits = series.histogram("wait_seconds", "Time that receivers waited for a seed", SLOW, "result")
        self._forks = ForkMetrics(series)
        self._caches = series.counter("caches", "Caches of seeds that starts used or missed", "kind", "result")
        self._cache_saved = series.counter("cache_saved_seconds", "Seconds that caches of seeds saved")
        self._dropped = series.counter("seeds_dropped", "Seeds dropped, by reason", "reason")
        self._events = series.counter("events", "Events of the store, by kind", "kind")
        self._refused = series.counter("refused", "Refused calls, by reason", "reason")
        # Series for alerts begin at 0: if one began at 1, Prometheus would see no increase.
        for reason in _REFUSALS:
            self._refused.labels(reason)
        for reason in (*_REASONS, OTHER):
            self._dropped.labels(reason)
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
        self._keys.of(key).grants += 1
        if waited_s is not None:
            self._waits.labels("granted").observe(waited_s)

    def missed(self, key: str, reason: str, waited_s: float | None) -> None:
        """Count a receiver that was sent to storage, after a wait or at once (None)."""
        misses = self._keys.of(key).misses
        misses[reason or "unknown"] = misses.get(reason or "unknown", 0) + 1
        if waited_s is not None:
            self._waits.labels("missed").observe(waited_s)

    def released(self, released: Released, outcome: Outcome | None) -> None:
        """Count a lease that its receiver released."""
        self._forks.released(released.held_s, outcome)
        if released.saved_s:
            self._keys.of(released.key).saved_s += released.saved_s

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

    def page(
        self, totals: Mapping[str, Totals] | None, names_of: Callable[[str], KeyNames] = lambda _: UNNAMED
    ) -> bytes:
        """Return the metrics in Prometheus's text format, with the fleet's ``totals`` and the names of keys.

        None: the store is unavailable. ``store_up`` is 0 then, and the fleet has no gauges: old or zero ones would be
        wrong.
        """
        self._store_up.set(totals is not None)
        self._leader.set(totals is not None)
        self._keys.update(totals, names_of)
        return generate_latest(self.registry)
