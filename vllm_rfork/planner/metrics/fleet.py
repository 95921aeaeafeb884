"""Gauges over the fleet, computed at the time of the scrape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_rfork.planner.metrics.series import PREFIX
from vllm_rfork.planner.store.base import Totals


class FleetGauges(Collector):
    """The fleet's gauges, from the latest totals; none while those are None."""

    def __init__(self) -> None:
        self.shown: Mapping[str, Totals] | None = {}
        self.keys = 0

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges for one scrape."""
        if self.shown is None:
            return
        yield GaugeMetricFamily(f"{PREFIX}keys", "Known keys", value=self.keys)
        seeds = GaugeMetricFamily(f"{PREFIX}seeds", "Seeds by state", labels=["key", "state"])
        gauges = {
            name: GaugeMetricFamily(f"{PREFIX}{shown}", help_, labels=["key"])
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
