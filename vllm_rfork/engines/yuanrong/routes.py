"""The route of the newest generation's data plane, and what it asks of a registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_rfork.engines.yuanrong.native import NAME, NativeEngine
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.alignment import ALIGNED_ROUTES, HIXL_ALIGNMENT, ROUTE_VARIABLE
from vllm_rfork.manifest.schema import Region


def route_of(native: NativeEngine) -> str:
    """``auto``, ``hccs`` or ``roce``, from an engine that is initialized."""
    policy: Any = native.call("open", "get_route_policy")
    return str(getattr(policy, "name", policy)).strip().lower()


def check_bases(route: str, regions: Sequence[Region]) -> None:
    """Raise :class:`EngineError` if ``route`` requires aligned regions and one of them is not.

    The engine would reject the whole call without a reason. A region is not extended here: the bytes before it may be
    outside its block of the allocator. ``NpuBackend.alignment`` extends regions within their blocks.
    """
    if route not in ALIGNED_ROUTES:
        return
    for region in regions:
        if region.address % HIXL_ALIGNMENT:
            raise EngineError(
                NAME,
                "register",
                f"{region} does not begin at a multiple of {HIXL_ALIGNMENT} bytes, which route {route} requires; set "
                f"{ROUTE_VARIABLE}={route} for all workers, so that regions are extended to one, or {ROUTE_VARIABLE}="
                "roce",
                side="receiver",
            )
