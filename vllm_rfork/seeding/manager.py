"""The seeds of this process: begun after a load, withdrawn before their bytes change, back when they are the same.

Once withdrawn, a seed is gone for good, and with it its epoch and its addresses. What may come is another seed, under
an epoch of its own, after the worker has found every tensor that it vouched for and digested it anew.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_rfork.config import Settings
from vllm_rfork.devices.registry import device_side
from vllm_rfork.errors import ForkError
from vllm_rfork.load import plan as plans
from vllm_rfork.load.plan import LoadPlan
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.model.relocation import Vouched
from vllm_rfork.model.tensors import Collection
from vllm_rfork.net.advertise import listen_host
from vllm_rfork.seed_key import WorkerIdentity
from vllm_rfork.seeding.seed import Seed, SeedConfig
from vllm_rfork.threads.native import native_thread
from vllm_rfork.vllm_compat.worker_hooks import withdraw_before_changes

logger = worker_logger(__name__)


@dataclass(eq=False)
class _Start:
    """A seed on its way, or there. Once ``withdrawn``, what was captured for it may have changed: it must not come.

    Attributes:
        vouched: what it offers.
        found: for a return, the tensors and the digests that they must have.
        after: the start before this one, whose thread must have ended.
        changes: how many withdrawals there had been when this was found to be good.
        off_device: set when the start asks nothing of the device any more.
    """

    plan: LoadPlan
    vouched: Vouched
    found: tuple[Collection, list[str]] | None = None
    after: _Start | None = None
    changes: int = 0
    off_device: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread = field(init=False)
    withdrawn: str = ""

    def begin(self) -> None:
        """Run in the background, unless a change has begun meanwhile."""
        self.thread = native_thread(_start, "rfork-seed", (self.plan, self))
        with _lock:
            if self.changes == _withdrawals.count:
                _starting.append(self)
                self.thread.start()
                return
            self.found = None
            if _withdrawals.may_return:
                _absent.append(self)
        self.plan.attempt.close()


@dataclass
class _Withdrawals:
    """How often the seeds of this process have been withdrawn, and whether they may return after the last time."""

    count: int = 0
    may_return: bool = True


_seeds: list[Seed] = []
_starting: list[_Start] = []
#: Withdrawn for a change, and not back yet.
_absent: list[_Start] = []
_withdrawals = _Withdrawals()
_lock = threading.Lock()

#: ``rfork_seed_port_base`` and the 255 ports after it: 16 ranks with a draft each, for 8 instances on one host.
PORTS_OF_INSTANCE = 32
INSTANCES_OF_HOST = 8
_LAST_PORT = 65535

#: How long, in seconds, capturing graphs waits for seeds that are being started: registering and digesting take less.
LEAVES_DEVICE_WITHIN_S = 5.0


class _Guard:
    """What the worker's methods tell."""

    def withdraw(self, reason: str, *, last: bool) -> None:
        withdraw_all(reason, may_return=not last)

    def leaves_device_alone(self) -> bool:
        with _lock:
            starting = [start for start in _starting if start.plan.device.type != "cpu"]
        deadline = time.monotonic() + LEAVES_DEVICE_WITHIN_S
        return all(start.off_device.wait(max(0.0, deadline - time.monotonic())) for start in starting)

    def come_back(self) -> None:
        come_back()


def become_seed(plan: LoadPlan, model: Any) -> None:
    """Offer what ``plan`` has captured of ``model``, in the background: the worker goes on starting meanwhile.

    Logs one WARNING with the reason where that is not possible; never raises a ForkError.
    """
    if plan.no_seed_reason or plan.collection is None:
        level = logging.INFO if not plan.settings.rfork_become_seed else logging.WARNING
        reason = plan.attempt.told.once(plan.no_seed_reason or "no weights were captured")
        logger.log(level, "this worker is not a seed: %s", reason)
        plan.attempt.close()
        return
    withdraw_before_changes(_Guard())
    keeps = plan.device.type in plans.KEEPS_LOADED
    vouched = Vouched.of(plan.seed_manifest(), plan.collection, model, keeps=keeps)
    _Start(plan, vouched, changes=_withdrawals.count).begin()


def come_back() -> None:
    """Be the seeds again that a change has withdrawn, in the background, as far as the bytes are what they were.

    Called where the change is over. Finding the tensors is done here, while nothing can change the model; digesting
    them is not. Logs one WARNING for each that cannot come back.
    """
    with _lock:
        absent, _absent[:] = list(_absent), []
        changes = _withdrawals.count
    for start in absent:
        try:
            found = start.vouched.again()
        except ForkError as error:
            _stays_away(start, error, changes)
        except Exception:
            # Whatever becomes of the seed, the worker's method has done its work.
            logger.exception("this worker is not a seed again")
        else:
            _Start(start.plan, start.vouched, found, start, changes).begin()


def _stays_away(start: _Start, error: ForkError, changes: int) -> None:
    logger.warning("this worker is not a seed again: %s: %s", type(error).__name__, error)
    if start.vouched.kept is not None or start.vouched.hopeless:
        start.vouched.forget()  # no memory is kept for what will hardly be
        return
    with _lock:
        # A later change may bring the bytes back: after a deep sleep, weights are loaded again.
        if changes == _withdrawals.count or _withdrawals.may_return:
            _absent.append(start)


def _start(plan: LoadPlan, start: _Start) -> None:
    try:
        device_side(plan.device).use()
        if start.found is not None:
            _prepare_return(plan, start, *start.found)
        if plan.reopen_engine:
            plan.attempt.reopen_engine()
        seed = _make(plan, start.off_device)
        with _lock:
            # From here on a withdrawal finds the seed; an earlier one has left word.
            withdrawn = start.withdrawn
            if not withdrawn:
                _seeds.append(seed)
        if withdrawn:
            seed.withdraw(withdrawn)
        try:
            address = seed.start()  # refuses where it has been withdrawn
        except BaseException:
            with _lock:
                _seeds[:] = [each for each in _seeds if each is not seed]
            raise
        if start.after is not None:
            logger.info("this worker is a seed again, at %s in a new epoch: its bytes are the same", address)
    except ForkError as error:
        _failed(plan, start, error)
    except Exception:
        # The guard of a background thread: serving goes on without being a seed.
        logger.exception("this worker is not a seed")
        _failed(plan, start, None)
    finally:
        start.off_device.set()
        plan.attempt.end_intent()
        plan.collection, start.found, start.after = None, None, None


def _prepare_return(plan: LoadPlan, start: _Start, collection: Collection, digests: list[str]) -> None:
    """Let the plan hold what was found again, once the thread that used it last has ended.

    Raises:
        ForkError: that thread hangs; or another change has begun.
    """
    settings = plan.settings
    before = start.after
    while before is not None and before.thread.ident is None:  # it never began
        before = before.after
    if before is not None:
        before.thread.join(settings.rfork_seed_timeout_sec + settings.rfork_request_timeout_sec)
        if before.thread.is_alive():
            start.vouched.forget()
            raise ForkError("the start of the seed before it still hangs")
    if start.withdrawn:
        raise ForkError(start.withdrawn)
    plan.collection, plan.digests = collection, digests
    plan.reopen_engine = True  # the engine before belonged to the seed before, and was closed with it
    plan.attempt.intent = ""  # it was fulfilled, or taken back


def _failed(plan: LoadPlan, start: _Start, error: ForkError | None) -> None:
    """The seed does not come. Withdrawn by a change, it may later; failing by itself, it may where nothing is kept."""
    plan.attempt.close()
    with _lock:
        withdrawn = start.withdrawn
        if not withdrawn:
            _starting[:] = [each for each in _starting if each is not start]
    if withdrawn:
        logger.info("this worker is not a seed now: %s", withdrawn)
    elif start.found is not None and error is not None:
        _stays_away(start, error, start.changes)
    elif error is not None:
        logger.warning("this worker is not a seed: %s: %s", type(error).__name__, plan.attempt.told.once(error))


def _make(plan: LoadPlan, off_device: threading.Event) -> Seed:
    settings = plan.settings
    port, *other_ports = seed_ports(settings, plan.identity)
    config = SeedConfig(
        planner_url=settings.rfork_scheduler_url,
        credentials=plan.attempt.credentials,
        bind_host=listen_host(settings.rfork_seed_bind_host, plan.advertise_host),
        advertise_host=plan.advertise_host,
        port=port,
        other_ports=tuple(other_ports),
        rank=plan.identity.tp_rank,
        request_timeout_s=settings.rfork_request_timeout_sec,
        ready_timeout_s=settings.rfork_seed_timeout_sec,
        heartbeat_interval_s=settings.rfork_heartbeat_interval_sec,
        labels=plan.attempt.labels,
        slots=settings.rfork_seed_slots or None,
        facts=plan.attempt.facts,
    )
    return Seed(
        config=config,
        manifest=msgspec.structs.replace(plan.seed_manifest(), checkpoint=plan.published_checkpoint()),
        engine=plan.attempt.hand_over_engine(),
        keep=plan.collection,
        recheck=plan.recheck,
        intent=plan.attempt.intent,
        off_device=off_device,
    )


def seed_ports(settings: Settings, identity: WorkerIdentity) -> list[int]:
    """The seed service's ports in the order in which they are tried; 0 for a random one.

    Each local rank and role of an instance has one of its own; further instances on the host, whose local ranks begin
    at 0 as well, move up by ``PORTS_OF_INSTANCE``.
    """
    base = settings.rfork_seed_port_base
    if not base:
        return [0]
    first = base + 2 * identity.local_rank + int(identity.is_draft)
    ports = [first + PORTS_OF_INSTANCE * number for number in range(INSTANCES_OF_HOST)]
    return [first] + [port for port in ports[1:] if port <= _LAST_PORT]


def withdraw_all(reason: str, *, may_return: bool = False) -> None:
    """Withdraw every seed of this process and wait until no receiver is given its addresses any more.

    ``may_return``: :func:`come_back` will be called when ``reason`` is over; until then, what a seed keeps beside the
    model stays. Otherwise all of it is let go.
    """
    with _lock:
        _withdrawals.count += 1
        _withdrawals.may_return = may_return
        seeds, _seeds[:] = list(_seeds), []
        starting, _starting[:] = list(_starting), []
        for start in starting:
            start.withdrawn = reason
        if may_return:
            _absent.extend(start for start in starting if not start.vouched.hopeless)
        else:
            _absent.clear()
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
