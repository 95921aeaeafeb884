"""The metrics of a worker: names, help texts, labels and buckets. All labels but the versions are from closed lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_rfork.messages import MISSES
from vllm_rfork.messages.causes import CAUSES
from vllm_rfork.messages.lanes import OTHER

#: Sources of weights: a seed, this worker's own memory (a reload that found the seed's bytes there), or storage.
SEED, MEMORY, STORAGE = "seed", "memory", "storage"
OK, FAILED = "ok", "failed"
#: Engine and lane of a load that used none.
NONE = "none"
#: Reasons for a load from storage besides those of planners and of errors: this model or worker cannot fork; the
#: settings name no model or planner.
INELIGIBLE, DISABLED = "ineligible", "disabled"
#: Reasons for a load from storage that have series of their own.
REASONS = frozenset({*MISSES, *CAUSES, INELIGIBLE, DISABLED, OTHER})
#: States of a worker's seed.
SEED_STATES = ("serving", "starting", "suspended", "none")


@dataclass(frozen=True)
class Family:
    """One metric.

    Attributes:
        name: with ``_total``, if it is a counter.
        buckets: upper bounds of a histogram in ascending order, without infinity.
        merged: of a gauge, how the values of several processes become one.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    merged: Literal["max", "sum"] = "max"


_LANE = ("engine", "lane")
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800)

BUILD_INFO = Family(
    "rfork_build_info",
    "gauge",
    "1, with the versions and the type of device of this worker",
    ("version", "vllm_version", "torch_version", "device"),
)
LOADS = Family(
    "rfork_loads_total", "counter", "Loads of model weights, by source and outcome", ("source", *_LANE, "outcome")
)
LOAD_SECONDS = Family(
    "rfork_load_seconds", "histogram", "Duration of successful loads of weights", ("source",), buckets=_SECONDS
)
STAGE_SECONDS = Family(
    "rfork_stage_seconds", "histogram", "Seconds of a load by stage", ("stage",), buckets=(0.01, *_SECONDS)
)
READ_BYTES = Family("rfork_read_bytes_total", "counter", "Bytes of weights that loads read", ("source", *_LANE))
SERVED_BYTES = Family(
    "rfork_served_bytes_total", "counter", "Bytes that receivers reported as read from this worker's seed"
)
SERVED_FORKS = Family(
    "rfork_served_forks_total", "counter", "Forks from this worker's seed that receivers reported as successful"
)
FALLBACKS = Family("rfork_fallbacks_total", "counter", "Loads from storage instead of a fork, by reason", ("reason",))
SEED_STATE = Family(
    "rfork_seed_state", "gauge", "Workers of this server, by the state of their seed", ("state",), merged="sum"
)
CACHES = Family(
    "rfork_caches_total",
    "counter",
    "Caches of seeds that starts used or missed, by kind and result",
    ("kind", "result"),
)
CACHE_SAVED = Family("rfork_cache_saved_seconds_total", "counter", "Seconds that caches of seeds saved")
SAVED = Family(
    "rfork_saved_seconds_total",
    "counter",
    "Seconds that forks saved, compared with the planner's measured load from storage",
)

FAMILIES = (
    *(BUILD_INFO, LOADS, LOAD_SECONDS, STAGE_SECONDS, READ_BYTES, SERVED_BYTES, SERVED_FORKS, FALLBACKS, SEED_STATE),
    *(CACHES, CACHE_SAVED, SAVED),
)
