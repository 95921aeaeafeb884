"""One seed: what a loaded worker does so that others may fork from it, from registering to withdrawing.

The order is the safety: memory is registered, the bytes are digested once more, the service answers, and only then
the planner hears of it; on the way back the service refuses first, the planner forgets, and only then the memory is
let go. Must not import torch or vLLM: the memory is kept alive by an opaque ``keep``.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_rfork.clients import PlannerClient
from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.errors import ForkError, SeedError
from vllm_rfork.fork.engine_handle import close_or_quarantine
from vllm_rfork.heartbeat import Heartbeat
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.messages import SeedAddress
from vllm_rfork.net.event_loop import BackgroundTask, background
from vllm_rfork.seed_service import SeedService
from vllm_rfork.seeding.publication import SeedConfig

logger = worker_logger(__name__)


@dataclass
class _Parts:
    """What has been started and must be ended, in the order of starting."""

    service: SeedService | None = None
    address: SeedAddress | None = None
    beat: Heartbeat | None = None
    beat_task: BackgroundTask | None = None


@dataclass
class Seed:
    """A worker's weights on offer, for one role (target or draft).

    Args:
        manifest: without endpoint and epoch; both are made here.
        engine: open; the seed owns it from now on and closes it when it ends.
        keep: whatever keeps the manifest's memory alive; dropped at the end.
        recheck: raises ForkError if the bytes are not the manifest's any more; run before announcing, dropped at the
            end because it refers to the memory as well.
        off_device: set when :meth:`start` asks nothing of the device any more.
    """

    config: SeedConfig
    manifest: Manifest
    engine: TransferEngine
    keep: Any
    recheck: Callable[[], None] | None
    intent: str = ""
    off_device: threading.Event = field(default_factory=threading.Event)
    _parts: _Parts = field(default_factory=_Parts)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _withdrawing: threading.Event = field(default_factory=threading.Event)
    _ended: bool = False

    @property
    def address(self) -> SeedAddress | None:
        """Where the seed is announced; None before :meth:`start` and after the end."""
        return self._parts.address

    def start(self) -> SeedAddress:
        """Register, check, serve, announce; returns the address under which the seed is announced.

        Raises:
            ForkError: it cannot be a seed; everything that was begun has been ended.
        """
        with self._lock:
            self._go_on()
            try:
                return self._start()
            except BaseException:
                self._end()
                raise

    def _go_on(self) -> None:
        """Raise where a withdrawal waits for the lock: it should not wait for all of a start."""
        if self._ended or self._withdrawing.is_set():
            raise SeedError("the seed has been withdrawn before it was ready")

    def _start(self) -> SeedAddress:
        if not self.engine.registered_nbytes:  # a worker that forked has registered already, to be written to
            self.engine.register(self.manifest.regions)
        self._go_on()
        if self.recheck is not None:
            self.recheck()
        self.off_device.set()
        self._go_on()
        epoch = uuid.uuid4().hex
        self.manifest = msgspec.structs.replace(self.manifest, endpoint=self.engine.endpoint, epoch=epoch)
        config = self.config
        client = PlannerClient(
            config.planner_url, request_timeout_s=config.request_timeout_s, credentials=config.credentials
        )
        service = SeedService(
            self.manifest,
            bind_host=config.bind_host,
            port=config.port,
            other_ports=config.other_ports,
            credentials=config.credentials,
            advertised_host=config.advertise_host,
            ready_timeout_s=config.ready_timeout_s,
            facts=config.facts,
        )
        self._parts.service = service
        self._go_on()  # after the line above: either this sees the withdrawal, or the withdrawal sees the service
        port = background().call(service.start(), config.ready_timeout_s + config.request_timeout_s)
        address = SeedAddress(config.advertise_host, port, config.rank)
        self._parts.address = address
        background().call(service.check_advertised(), config.request_timeout_s + config.ready_timeout_s)
        self._go_on()
        self._parts.beat = Heartbeat(
            client,
            self.manifest.seed_key,
            address,
            interval_s=config.heartbeat_interval_s,
            fingerprint=self.manifest.fingerprint,
            epoch=epoch,
            slots=config.slots,
            labels=config.labels,
            intent=self.intent,
        )
        self._parts.beat_task = background().spawn(self._parts.beat.run(), f"rfork-heartbeat {address}")
        self._go_on()
        logger.debug("seed %s is ready, epoch %s", address, epoch)
        return address

    def withdraw(self, reason: str) -> None:
        """Stop being a seed before ``reason`` happens to the bytes. Idempotent; logs what could not be done.

        Bounded by ``ready_timeout_s`` and a few times ``request_timeout_s``. A start that takes longer, in a native
        call that hangs, is left to end by itself: it serves and announces nothing any more.
        """
        self._withdrawing.set()
        service = self._parts.service
        if service is not None:
            # Outside the lock and first of all: from here on no receiver is given an address.
            service.suspend(reason)
        bound_s = self.config.ready_timeout_s + self.config.request_timeout_s
        if not self._lock.acquire(timeout=bound_s):
            logger.warning("the seed that is being started does not notice its withdrawal: %s", reason)
            return
        try:
            if self._ended:
                return
            if self._parts.address is not None:
                logger.info("seed %s withdraws: %s", self._parts.address, reason)
            self._end()
        finally:
            self._lock.release()

    def _end(self) -> None:
        self._ended = True
        parts, self._parts = self._parts, _Parts()
        bound_s = self.config.request_timeout_s + 1.0
        service, beat, task = parts.service, parts.beat, parts.beat_task
        if beat is not None:
            self._attempt("withdraw at the planner", lambda: background().call(beat.withdraw(), bound_s))
        if task is not None:
            self._attempt("stop the heartbeat", lambda: task.cancel(bound_s))
        if service is not None:
            self._attempt("stop the seed service", lambda: background().call(service.stop(), bound_s))
        close_or_quarantine(self.engine, self.keep)
        self.keep = None
        self.recheck = None

    @staticmethod
    def _attempt(what: str, action: Callable[[], object]) -> None:
        """Run one step of the clean-up; the clean-up continues if it fails, and the log names the cause."""
        try:
            action()
        except (ForkError, TimeoutError, OSError) as error:
            logger.warning("could not %s: %s", what, error)
