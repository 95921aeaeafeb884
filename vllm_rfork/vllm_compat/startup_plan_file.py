"""vLLM's file of a start-up plan: four numbers under a name that the worker's vLLM computes.

Read in vLLM 0.26 and 0.32 (``v1/worker/startup_plan.py``), which are equal.
"""

from __future__ import annotations

import re

import msgspec

from vllm_rfork.caches.safe.parsing import parsed
from vllm_rfork.caches.safe.startup_plan import MAX_NBYTES, MAX_PLAN_NBYTES, CarriedPlan, DeviceMemory, fit_obstacle
from vllm_rfork.errors import CacheError

#: vLLM's ``PLAN_SCHEMA_VERSION``.
SCHEMA = 1
_FINGERPRINT = re.compile(r"[0-9a-f]{16}\Z")


class PlanFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the file."""

    schema: int
    fingerprint: str
    kv_cache_memory_bytes: int
    free_memory_baseline: int


def parse_plan_file(body: bytes, fingerprint: str) -> PlanFile:
    """The file of that fingerprint, as a seed finds it on its own disk.

    Raises:
        CacheError: of another schema or fingerprint, or impossible.
    """
    plan = parsed(body, PlanFile, "vLLM's start-up plan", MAX_PLAN_NBYTES)
    if plan.schema != SCHEMA or plan.fingerprint != fingerprint:
        raise CacheError(f"vLLM's start-up plan has schema {plan.schema} and fingerprint {plan.fingerprint!r}")
    if not all(0 < nbytes <= MAX_NBYTES for nbytes in (plan.kv_cache_memory_bytes, plan.free_memory_baseline)):
        raise CacheError(f"vLLM's start-up plan has impossible sizes: {plan}")
    return plan


def plan_file(plan: CarriedPlan, fingerprint: str, own: DeviceMemory, settings: dict[str, str]) -> bytes:
    """The file for this worker, with the numbers of a seed's plan.

    Args:
        fingerprint: computed by this worker's vLLM, 16 hexadecimal digits.
        own, settings: as in :func:`~vllm_rfork.caches.safe.startup_plan.fit_obstacle`.

    Raises:
        CacheError: the plan does not fit.
        ValueError: ``fingerprint`` is not one.
    """
    if not _FINGERPRINT.match(fingerprint):
        raise ValueError(f"not a fingerprint of vLLM's: {fingerprint!r}")
    if (obstacle := fit_obstacle(plan, own, settings)) is not None:
        raise CacheError(f"the seed's start-up plan does not fit: {obstacle}")
    baseline_nbytes = min(plan.memory.free_nbytes, own.free_nbytes)  # vLLM refuses a plan made with more free memory
    return msgspec.json.encode(PlanFile(SCHEMA, fingerprint, plan.cache_nbytes, baseline_nbytes))
