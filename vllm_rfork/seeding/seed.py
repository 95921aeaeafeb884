"""One seed, from registering its memory to its withdrawal.

The order makes it safe. On the way up memory is registered, the bytes are digested once more, the service answers, and
only then is the seed announced. On the way down the service refuses first, the seed is withdrawn at the planner, and
only then is the memory released.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from vllm_rfork.clients import PlannerClient
from vllm_rfork.errors import ForkError, SeedError
from vllm_rfork.heartbeat import Heartbeat
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.messages import SeedAddress
from vllm_rfork.metrics import worker as metrics
from vllm_rfork.net.event_loop import BackgroundTask, background
from vllm_rfork.seed_service import SeedService
from vllm_rfork.seeding.engines import SeedEngines
from vllm_rfork.seeding.publication import SeedConfig
from vllm_rfork.startup import offers, report

logger = worker_logger(__name__)


@dataclass
class _Parts:
    """Parts that have been started, in that order, and must be ended."""

    service: SeedService | None = None
    address: SeedAddress | None = None
    beat: Heartbeat | None = None
    beat_task: BackgroundTask | None = None


@dataclass
class Seed:
    """The published weights of one model.

    Args:
        manifest: without endpoint and epoch; both are added here.
        engines: the seed owns them from now on and closes them when it ends.
        keep: an object that keeps the manifest's memory alive; dropped at the end.
        recheck: raises ForkError if the bytes are not the manifest's any more; called before announcing, and dropped
            at the end because it refers to the memory as well.
        off_device: set when :meth:`start` no longer needs the device.
    """

    config: SeedConfig
    manifest: Manifest
    engines: SeedEngines
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
        """The announced address; None before :meth:`start` and after the end."""
        return self._parts.address

    def start(self) -> SeedAddress:
        """Register, check, serve and announce; returns the announced address.

        Raises:
            ForkError: it cannot be a seed; every part that was started has been ended.
        """
        with self._lock:
            self._stop_if_withdrawn()
            try:
                return self._start()
            except BaseException:
                self._end()
                raise

    def _stop_if_withdrawn(self) -> None:
        """Raise SeedError if a withdrawal waits for the lock, so that it does not wait for the whole start."""
        if self._ended or self._withdrawing.is_set():
            raise SeedError("the seed has been withdrawn before it was ready")

    def _start(self) -> SeedAddress:
        started = time.monotonic()
        bound_s = self.config.ready_timeout_s
        self.engines.register(self.manifest.regions, self.keep, bound_s, self._stop_if_withdrawn)
        self._stop_if_withdrawn()
        if self.recheck is not None:
            self.recheck()
        self._stop_if_withdrawn()
        epoch = uuid.uuid4().hex
        manifest = msgspec.structs.replace(self.manifest, epoch=epoch)
        self.manifest = self.engines.offer(manifest, self.keep, bound_s)
        self.off_device.set()  # not earlier: endpoints export handles, and an engine that is left out is closed
        self._stop_if_withdrawn()
        address = self._serve()
        self._stop_if_withdrawn()
        self._announce(address)
        self._stop_if_withdrawn()
        self._log_ready(address, time.monotonic() - started)
        return address

    def _log_ready(self, address: SeedAddress, seconds: float) -> None:
        self.engines.log_failures()
        nbytes = self.manifest.nbytes
        logger.info(
            "seed %s offers %d bytes (%.2f GB), ready in %.2f s, engines=%s epoch=%s",
            address,
            nbytes,
            nbytes / 1e9,
            seconds,
            ",".join(self.engines.names),
            self.manifest.epoch,
        )

    def _serve(self) -> SeedAddress:
        config = self.config
        service = SeedService(
            self.manifest,
            bind_host=config.bind_host,
            port=config.port,
            other_ports=config.other_ports,
            credentials=config.credentials,
            advertised_host=config.advertise_host,
            ready_timeout_s=config.ready_timeout_s,
            facts=config.facts,
            caches=offers.source(),
        )
        self._parts.service = service
        # After the line above: either this call finds the withdrawal, or the withdrawal finds the service.
        self._stop_if_withdrawn()
        bound_s = config.ready_timeout_s + config.request_timeout_s
        port = background().call(service.start(), bound_s)
        address = self._parts.address = SeedAddress(config.advertise_host, port, config.rank)
        background().call(service.check_advertised(), bound_s)
        return address

    def _announce(self, address: SeedAddress) -> None:
        config = self.config
        client = PlannerClient(
            config.planner_url,
            request_timeout_s=config.request_timeout_s,
            credentials=config.credentials,
            model=config.model,
            strategy=config.strategy,
        )
        self._parts.beat = Heartbeat(
            client,
            self.manifest.seed_key,
            address,
            interval_s=config.heartbeat_interval_s,
            fingerprint=self.manifest.fingerprint,
            epoch=self.manifest.epoch,
            slots=config.slots,
            labels=config.labels,
            intent=self.intent,
            caches=partial(report.announced, self.manifest.seed_key),
            parent=config.parent,
            differs=config.differs,
            served=metrics.served,
        )
        self._parts.beat_task = background().spawn(self._parts.beat.run(), f"rfork-heartbeat {address}")
        report.begin_announcing(self._announce_again)

    def _announce_again(self) -> None:
        """Announce results of this start that were not known before."""
        beat = self._parts.beat
        if beat is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
                background().in_loop(beat.soon)

    def withdraw(self, reason: str) -> None:
        """Stop being a seed, before ``reason`` changes the bytes. Idempotent; failures of single steps are logged.

        Takes at most twice ``ready_timeout_s`` and a few times ``request_timeout_s``. A start that takes longer, in a
        native call that hangs, ends by itself later: it serves and announces nothing any more.
        """
        self._withdrawing.set()
        service = self._parts.service
        if service is not None:
            # First, and outside the lock: from here on no receiver gets an address.
            service.suspend(reason)
        bound_s = self.config.ready_timeout_s + self.config.request_timeout_s
        if not self._lock.acquire(timeout=bound_s):
            logger.warning("the start of the seed hangs, so it is left to end by itself: %s", reason)
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
        report.end_announcing(self._announce_again)
        parts, self._parts = self._parts, _Parts()
        bound_s = self.config.request_timeout_s + 1.0
        service, beat, task = parts.service, parts.beat, parts.beat_task
        if beat is not None:
            self._attempt("withdraw at the planner", lambda: background().call(beat.withdraw(), bound_s))
        if task is not None:
            self._attempt("stop the heartbeat", lambda: task.cancel(bound_s))
        if service is not None:
            self._attempt("stop the seed service", lambda: background().call(service.stop(), bound_s))
        self.engines.close(self.keep, self.config.ready_timeout_s)
        self.keep = None
        self.recheck = None

    @staticmethod
    def _attempt(what: str, action: Callable[[], object]) -> None:
        """Run one step of the clean-up; the clean-up continues if it fails, and the log names the cause."""
        try:
            action()
        except (ForkError, TimeoutError, OSError) as error:
            logger.warning("could not %s: %s", what, error)
