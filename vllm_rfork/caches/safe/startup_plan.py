"""The start-up plan: the bytes for the KV cache that a seed measured, so that a receiver need not measure them.

vLLM's own file has no more than the result and the free memory of the moment; its name does not depend on
``gpu_memory_utilization`` or on multi-modal limits. So a plan travels with the numbers that it follows from, and a
receiver uses it only if its own are the same, and if it fits.
"""

from __future__ import annotations

import msgspec

from vllm_rfork.caches.safe.parsing import parsed
from vllm_rfork.errors import CacheError
from vllm_rfork.logs.quoting import printable

MAX_PLAN_NBYTES = 64 * 1024
#: No device has more bytes.
MAX_NBYTES = 2**50
#: vLLM keeps that much beside what it has measured.
RESERVE_NBYTES = 150 * 1024**2
#: A plan that leaves the KV cache less than this share of the memory beside the weights is not used: vLLM's own
#: measurement gives more, and a plan that is too small fails a start.
SMALLEST_SHARE = 0.5
#: Differences up to this many bytes in measured weights come from the allocator.
TOLERANCE_NBYTES = 64 * 1024**2


class DeviceMemory(msgspec.Struct, frozen=True):
    """Memory of one device during one start, in bytes.

    Attributes:
        total_nbytes: of the device.
        free_nbytes: before anything was loaded, which is vLLM's ``init_snapshot``.
        requested_nbytes: the part that this worker may use: total times ``gpu_memory_utilization``.
        weights_nbytes: measured by vLLM when the model had been loaded.
    """

    total_nbytes: int
    free_nbytes: int
    requested_nbytes: int
    weights_nbytes: int


class CarriedPlan(msgspec.Struct, frozen=True):
    """A plan on the wire.

    Attributes:
        cache_nbytes: bytes for the KV cache, after profiling and after graphs.
        graphs_nbytes: bytes that graphs took on the seed; 0 without graphs.
        memory: of the seed's device when the plan was made.
        settings: options that memory depends on, as name → short text.
    """

    cache_nbytes: int
    graphs_nbytes: int
    memory: DeviceMemory
    settings: dict[str, str]


def decode_plan(body: bytes) -> CarriedPlan:
    """A plan from the wire.

    Raises:
        CacheError: not a plan, or its numbers are impossible.
    """
    plan = parsed(body, CarriedPlan, "the seed's start-up plan", MAX_PLAN_NBYTES)
    memory = plan.memory
    sizes = (plan.cache_nbytes, memory.total_nbytes, memory.free_nbytes, memory.requested_nbytes, memory.weights_nbytes)
    possible = all(0 < nbytes <= MAX_NBYTES for nbytes in sizes) and 0 <= plan.graphs_nbytes <= memory.total_nbytes
    within = max(memory.free_nbytes, memory.requested_nbytes) <= memory.total_nbytes
    if (
        not possible
        or not within
        or plan.cache_nbytes + plan.graphs_nbytes + memory.weights_nbytes > memory.requested_nbytes
    ):
        raise CacheError(
            f"the seed's start-up plan is not possible: {plan.cache_nbytes} + {plan.graphs_nbytes} bytes in {memory}"
        )
    return plan


def encode_plan(plan: CarriedPlan) -> bytes:
    """JSON bytes of ``plan`` for the wire."""
    return msgspec.json.encode(plan)


def fit_obstacle(plan: CarriedPlan, own: DeviceMemory, settings: dict[str, str]) -> str | None:
    """The reason why this worker must measure by itself; None if the plan is as good as its own measurement.

    Args:
        plan: decoded, so that its numbers are possible.
        settings: this worker's options that memory depends on.
    """
    theirs = plan.memory
    for name in sorted({*settings, *plan.settings}):
        here, there = settings.get(name, "not set"), plan.settings.get(name, "not set")
        if here != there:
            return f"{printable(name)} is {printable(here)} here and {printable(there)} on the seed"
    for what, here_nbytes, there_nbytes, tolerance in (
        ("the device", own.total_nbytes, theirs.total_nbytes, 0),
        ("the part that may be used", own.requested_nbytes, theirs.requested_nbytes, 0),
        ("the model", own.weights_nbytes, theirs.weights_nbytes, TOLERANCE_NBYTES),
    ):
        if abs(here_nbytes - there_nbytes) > tolerance:
            return f"{what} has {here_nbytes} bytes here and {there_nbytes} on the seed"
    # A measurement does not depend on how much more was free, so equal amounts are not demanded.
    if own.free_nbytes < own.requested_nbytes:
        return f"{own.free_nbytes} bytes were free here at the beginning, fewer than {own.requested_nbytes} requested"
    beside = own.requested_nbytes - own.weights_nbytes
    if plan.cache_nbytes > beside - RESERVE_NBYTES:
        return f"{plan.cache_nbytes} bytes for the KV cache are more than {beside} beside the weights allow"
    if plan.cache_nbytes < SMALLEST_SHARE * beside:
        return f"{plan.cache_nbytes} bytes for the KV cache are less than half of {beside} beside the weights"
    return None


def capped(plan: CarriedPlan, own: DeviceMemory, beside_cache_nbytes: int) -> int:
    """Bytes for the KV cache that keep this worker inside its requested memory; at most the plan's.

    Args:
        beside_cache_nbytes: measured here after the profiling run: weights, the peak of activations, and memory outside
            torch. It may be more than on the seed, whose ranks may have other neighbours.
    """
    return min(plan.cache_nbytes, own.requested_nbytes - beside_cache_nbytes - plan.graphs_nbytes - RESERVE_NBYTES)
