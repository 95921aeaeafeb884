"""vLLM's start-up plan: the bytes for the KV cache, applied only where every rank has a plan that is right for it.

With ``VLLM_ENABLE_STARTUP_PLAN=1``, vLLM stores what it measured in ``$VLLM_CACHE_ROOT/startup_plan`` and skips the
measurement of graphs in later starts; the profiling run, which compiles, still takes place. Its file does not depend on
``gpu_memory_utilization`` or multi-modal limits, and each rank decides by itself, although the measurement that is
skipped has collectives: ranks that decide differently hang. So this module enables plans unless the user has decided,
and lets vLLM apply one only if

1. it comes from a seed, or an earlier start, with the same settings and the same memory (``plan_memory.py``),
2. all ranks agree, before the profiling run and again after it, and
3. after that run, the cache fits beside what this worker takes. Otherwise it becomes smaller, and vLLM measures if it
   would become much smaller.

Read in vLLM 0.26 and 0.32 (``v1/worker/startup_plan.py``, ``gpu_worker.py``).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_rfork.caches.safe.startup_plan import SMALLEST_SHARE, capped
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import listener, listens
from vllm_rfork.vllm_compat.start_up.plan_memory import beside_cache_nbytes, needed_nbytes, reset_peak
from vllm_rfork.vllm_compat.start_up.plans import KIND, StartUpPlan

logger = worker_logger(__name__)

FLAG = "VLLM_ENABLE_STARTUP_PLAN"
#: Votes of the ranks: on plans before the profiling run, and on caches after it.
FOUND, FITS = "start-up plan", "start-up plan after profiling"
_MARK = "_rfork_guards_plan"
_START = "_rfork_start_up_plan"


@dataclass
class _Start:
    """One measurement of a worker's memory.

    Attributes:
        plan: None if it could not be made. It may be of no use, where the user's own is applied instead.
        accepted: all ranks go on with a plan, this package's or the user's own, until a second vote.
        rejected: all ranks measure, because one of them has rejected its plan in that vote.
    """

    plan: StartUpPlan | None = None
    accepted: bool = False
    rejected: bool = False

    @property
    def applied(self) -> StartUpPlan | None:
        """The plan, if it is applied."""
        return self.plan if self.plan is not None and self.plan.applied is not None else None

    def drop(self, cache_config: Any) -> None:
        """Let vLLM measure."""
        self.accepted, cache_config.kv_cache_memory_bytes = False, None
        if self.plan is not None:
            self.plan.applied = None


def install() -> None:
    """Guard the plans of vLLM's GPU workers in this process, and enable them unless the user decided. Idempotent.

    Raises:
        ImportError, AttributeError: this vLLM has no start-up plans.
    """
    from vllm.platforms import current_platform
    from vllm.v1.worker import gpu_worker

    apply, save = gpu_worker.maybe_apply_startup_plan, gpu_worker.maybe_save_startup_plan
    if not current_platform.is_cuda():
        return
    if not hasattr(apply, _MARK):
        gpu_worker.maybe_apply_startup_plan = _applying(apply, user_decided=FLAG in os.environ)
        gpu_worker.maybe_save_startup_plan = _saving(save)
        gpu_worker.Worker.determine_available_memory = _fitting(gpu_worker.Worker.determine_available_memory)
    if FLAG not in os.environ:
        os.environ[FLAG] = "1"
        _Flag.set_here = True


def disable() -> None:
    """Disable the plans that :func:`install` has enabled, for a start of this process that carries no caches."""
    if _Flag.set_here:
        os.environ.pop(FLAG, None)
        _Flag.set_here = False


class _Flag:
    set_here = False


def _fitting(determine: Callable[[Any], int]) -> Callable[[Any], int]:
    """``Worker.determine_available_memory`` whose result, if it is a plan's, has been compared with this device."""

    @functools.wraps(determine)
    def determine_available_memory(self: Any) -> int:
        start = _Start()
        setattr(self, _START, start)
        with guarded(KIND):
            reset_peak()
        value = determine(self)
        if not start.accepted:
            return value
        # A rank with the user's own plan votes, too: the others measure together with it, or not at all.
        plan = start.applied
        rejection = listener().agree(FITS, None if plan is None else _obstacle_after_profiling(self, plan))
        if rejection is None:
            return value if plan is None else plan.fitted(self.cache_config, value)
        logger.info("caches: vLLM measures its memory, because the start-up plan was rejected: %s", rejection)
        start.drop(self.cache_config)
        start.rejected = True
        return determine(self)

    setattr(determine_available_memory, _MARK, True)
    return determine_available_memory


def _obstacle_after_profiling(worker: Any, plan: StartUpPlan) -> str | None:
    """The reason why the applied plan does not fit; None, with the size that does fit in ``plan.fitting_nbytes``."""
    try:
        beside_nbytes = beside_cache_nbytes(worker, plan.memory)
        planned = plan.applied
        if planned is None:
            return "no plan was applied"
        plan.fitting_nbytes = capped(planned, plan.memory, beside_nbytes)
        if plan.fitting_nbytes < SMALLEST_SHARE * planned.cache_nbytes:
            return f"only {plan.fitting_nbytes} of {planned.cache_nbytes} bytes for the KV cache fit beside the model"
        if plan.fitting_nbytes < (needed := needed_nbytes(worker)):
            return f"{plan.fitting_nbytes} bytes for the KV cache are fewer than {needed}, which long requests may take"
    except Exception as error:  # noqa: BLE001 - the other ranks wait for this one's vote, so it is cast in any case
        return f"{type(error).__name__}: {error}"
    return None


def _applying(apply: Callable[[Any], None], *, user_decided: bool) -> Callable[[Any], None]:
    """``maybe_apply_startup_plan``, which applies a plan on all ranks or on none."""

    @functools.wraps(apply)
    def maybe_apply_startup_plan(worker: Any) -> None:
        if not listens():  # a later start of the process, with rfork_caches=off
            if user_decided:
                apply(worker)
            return
        start: _Start = vars(worker).setdefault(_START, _Start())
        if worker.cache_config.kv_cache_memory_bytes is not None or start.rejected:
            return
        obstacle = _obstacle(worker, start, apply, user_decided=user_decided)
        if not _enabled():
            return
        rejection = listener().agree(FOUND, obstacle)
        start.accepted = rejection is None
        if rejection is not None:
            start.drop(worker.cache_config)
            logger.info("caches: vLLM measures its memory without a start-up plan: %s", rejection)

    setattr(maybe_apply_startup_plan, _MARK, True)
    return maybe_apply_startup_plan


def _obstacle(worker: Any, start: _Start, apply: Callable[[Any], None], *, user_decided: bool) -> str | None:
    """The reason why ``apply`` has not applied a right plan to ``worker``; None if it has."""
    plan = None
    try:
        plan = start.plan = StartUpPlan.of(worker)
        obstacle = plan.obstacle() if _enabled() else "plans are not enabled"
    except Exception as error:  # noqa: BLE001 - vLLM computes its keys, and the other ranks wait for this vote
        obstacle = f"{type(error).__name__}: {error}"
    # A plan of which this package has no record is the user's choice alone.
    if obstacle is not None and not (user_decided and (plan is None or not plan.recorded)):
        return obstacle
    try:
        apply(worker)
    except Exception as error:  # noqa: BLE001 - as above
        return f"{type(error).__name__}: {error}"
    applied_nbytes = worker.cache_config.kv_cache_memory_bytes
    if applied_nbytes is None:
        return obstacle or "vLLM did not apply it"
    if plan is not None and plan.applied is not None and applied_nbytes != plan.applied.cache_nbytes:
        return f"vLLM applied another one, with {applied_nbytes} bytes"
    return None


def _enabled() -> bool:
    from vllm import envs

    return bool(envs.VLLM_ENABLE_STARTUP_PLAN)


def _saving(save: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """``maybe_save_startup_plan``, which vLLM calls after every measurement, with plans or without."""

    @functools.wraps(save)
    def maybe_save_startup_plan(worker: Any, kv_cache_memory_bytes: int) -> None:
        with guarded(KIND):
            save(worker, kv_cache_memory_bytes)
            start = getattr(worker, _START, None)
            if start is not None and start.plan is not None:
                start.plan.measured(kv_cache_memory_bytes, keep=_enabled())

    setattr(maybe_save_startup_plan, _MARK, True)
    return maybe_save_startup_plan
