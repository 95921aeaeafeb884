"""The seeds of this process: begun after a load, withdrawn before their bytes change."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from vllm_rfork.config import Settings
from vllm_rfork.errors import ForkError
from vllm_rfork.plan import LoadPlan
from vllm_rfork.seed import Seed, SeedConfig
from vllm_rfork.seed_key import WorkerIdentity
from vllm_rfork.vllm_compat.workers import withdraw_before_changes

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Start:
    """A seed on its way. Once ``withdrawn``, what was captured for it may have changed: it must not come."""

    thread: threading.Thread = field(init=False)
    withdrawn: str = ""


_seeds: list[Seed] = []
_starting: list[_Start] = []
_lock = threading.Lock()


def become_seed(plan: LoadPlan) -> None:
    """Offer what ``plan`` has captured, in the background: the worker goes on starting meanwhile.

    Logs one WARNING with the reason where that is not possible; never raises a ForkError.
    """
    if plan.no_seed_reason or plan.collection is None:
        level = logging.INFO if not plan.settings.rfork_become_seed else logging.WARNING
        logger.log(level, "RFork: this worker is not a seed: %s", plan.no_seed_reason or "no weights were captured")
        plan.attempt.close()
        return
    withdraw_before_changes(withdraw_all)
    start = _Start()
    start.thread = threading.Thread(target=_start, args=(plan, start), name="rfork-seed", daemon=True)
    with _lock:
        _starting.append(start)
        start.thread.start()


def _start(plan: LoadPlan, start: _Start) -> None:
    try:
        if plan.reopen_engine:
            plan.attempt.reopen_engine()
        seed = _make(plan)
        with _lock:
            # From here on a withdrawal finds the seed; an earlier one has left word.
            withdrawn = start.withdrawn
            if not withdrawn:
                _seeds.append(seed)
        if withdrawn:
            seed.withdraw(withdrawn)
        try:
            seed.start()  # refuses where it has been withdrawn
        except BaseException:
            with _lock:
                _seeds[:] = [each for each in _seeds if each is not seed]
            raise
    except ForkError as error:
        logger.warning("RFork: this worker is not a seed: %s: %s", type(error).__name__, error)
        plan.attempt.close()
    except Exception:
        # The guard of a background thread: serving goes on without being a seed.
        logger.exception("RFork: this worker is not a seed")
        plan.attempt.close()
    finally:
        plan.attempt.end_intent()
        plan.collection = None


def _make(plan: LoadPlan) -> Seed:
    settings = plan.settings
    config = SeedConfig(
        planner_url=settings.rfork_scheduler_url,
        credentials=plan.attempt.credentials,
        bind_host=settings.rfork_seed_bind_host,
        advertise_host=plan.advertise_host,
        port=seed_port(settings, plan.identity),
        rank=plan.identity.tp_rank,
        request_timeout_s=settings.rfork_request_timeout_sec,
        ready_timeout_s=settings.rfork_seed_timeout_sec,
        heartbeat_interval_s=settings.rfork_heartbeat_interval_sec,
        labels=plan.attempt.labels,
        slots=settings.rfork_seed_slots or None,
    )
    return Seed(
        config=config,
        manifest=plan.seed_manifest(),
        engine=plan.attempt.hand_over_engine(),
        keep=plan.collection,
        recheck=plan.recheck,
        intent=plan.attempt.intent,
    )


def seed_port(settings: Settings, identity: WorkerIdentity) -> int:
    """The seed service's port: 0 for a random one, else one of its own for every local rank and role."""
    base = settings.rfork_seed_port_base
    return base + 2 * identity.local_rank + int(identity.is_draft) if base else 0


def withdraw_all(reason: str) -> None:
    """Withdraw every seed of this process and wait until no receiver is given its addresses any more."""
    with _lock:
        seeds, _seeds[:] = list(_seeds), []
        starting, _starting[:] = list(_starting), []
        for start in starting:
            start.withdrawn = reason
    for seed in seeds:
        seed.withdraw(reason)
    for start in starting:
        if start.thread is not threading.current_thread():
            start.thread.join(timeout=1.0)  # tidier for what comes; it announces nothing any more


def wait_until_started(timeout_s: float) -> list[Seed]:
    """Wait for seeds that are being started, for at most ``timeout_s`` seconds each; returns all live ones."""
    with _lock:
        starting = list(_starting)
    for start in starting:
        start.thread.join(timeout_s)
    with _lock:
        return list(_seeds)
