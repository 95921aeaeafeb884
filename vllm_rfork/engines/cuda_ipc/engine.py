"""CUDA IPC as a transfer engine: maps the seed's allocations into this process and copies them.

Works between any two processes of one host, in any pid, ipc and mount namespaces, if the receiver's container can open
the seed's GPU. The seed takes no part in a read. A mapping keeps the memory alive: a read continues when the seed's
process is killed, and the digests decide whether the bytes are right. A seed that closes erases its identity, which
every read compares afterwards.

The driver exports no memory of expandable segments, memory pools or vLLM's sleep mode.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from vllm_rfork.engines.base import EngineConfig, Limits, Place, TransferEngine
from vllm_rfork.engines.cuda_ipc.driver import NAME, Driver
from vllm_rfork.engines.cuda_ipc.endpoint import (
    IDENTITY_NBYTES,
    Allocation,
    Endpoint,
    boot_id,
    decode,
    encode,
)
from vllm_rfork.engines.cuda_ipc.obstacles import ELSEWHERE, obstacle
from vllm_rfork.engines.cuda_ipc.peer import MappedPeer, map_peer
from vllm_rfork.engines.cuda_ipc.streams import CopyStreams
from vllm_rfork.engines.one_caller import OneCaller
from vllm_rfork.engines.refusals import not_connected
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

#: The size of the identity's allocation; the driver allocates no less.
_PAGE_NBYTES = 4096


class CudaIpcEngine(TransferEngine):
    """See the module's docstring."""

    name: ClassVar[str] = NAME
    device_types: ClassVar[frozenset[str]] = frozenset({"cuda"})
    # 2 GiB take 5 ms over NVLink: long enough to make the pause after a batch negligible, short enough to digest one
    # batch while the next is read.
    limits: ClassVar[Limits] = Limits(max_batch_nbytes=2 * 1024**3, max_batch_items=65536)
    opens_quickly: ClassVar[bool] = True

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._calls = OneCaller(NAME)
        self._table = RegionTable(NAME)
        self._allocations: dict[int, Allocation] = {}
        self._peers: dict[str, MappedPeer] = {}
        self._late: list[MappedPeer] = []  # their identity may still be read
        self._streams: CopyStreams | None = None
        self._page = 0
        self._identity = b""
        self._boot = ""

    # -- the port ------------------------------------------------------------------------------------------------

    @classmethod
    def self_check(cls) -> str:
        """Load the driver and retain the first device's context."""
        Driver(0).release()
        return "the CUDA driver loads, and there is a device"

    @classmethod
    def lane_to(cls, place: Place, device_type: str) -> str:
        """It reaches every container of its host that can open the seed's GPU."""
        if place == "elsewhere":
            raise EngineError(NAME, "connect", ELSEWHERE, code="lane", side="receiver")
        return NAME

    @classmethod
    def lane_obstacle(cls, endpoint: str, config: EngineConfig) -> str | None:
        """The seed is on another host, or this container lacks the device file of its GPU."""
        return obstacle(decode(endpoint), boot_id())

    def open(self, config: EngineConfig) -> None:
        """Retain the device's primary context and create streams: milliseconds if torch has the context already.

        Raises:
            EngineUnavailable: there is no CUDA driver.
            EngineError: there is no such device.
        """
        kind, _, index = config.device.partition(":")
        if kind != "cuda":
            raise EngineError(NAME, "open", f"this engine cannot read the memory of {config.device}")
        with self._calls.turn("open"):
            if self._driver is not None:
                raise EngineError(NAME, "open", "it is open already")
            boot = boot_id()
            driver = Driver(int(index or 0))
            self._identity = uuid.uuid4().bytes
            with driver.current("open"):
                self._streams = CopyStreams(driver, self._stop_reason)
                self._page = driver.allocate(_PAGE_NBYTES)
                driver.write(self._page, self._identity)
            self._boot = boot
            self._calls.opened(config.timeout_s)
            self._driver = driver

    @property
    def endpoint(self) -> str:
        """JSON of :class:`~vllm_rfork.engines.cuda_ipc.endpoint.Endpoint`."""
        with self._exclusively("register") as driver:
            return encode(
                Endpoint(
                    boot=self._boot,
                    device=driver.uuid(),
                    identity=self._identity,
                    page=Allocation(self._page, _PAGE_NBYTES, driver.export(self._page)),
                    allocations=[self._allocations[base] for base in sorted(self._allocations)],
                    regions=[(region.address, region.nbytes) for region in self._table.regions],
                )
            )

    def register(self, regions: Sequence[Region]) -> None:
        """Find the allocation of each region and its handle: 10 µs each, independent of the size.

        Raises:
            EngineError: a region is not in one allocation of this device, or the driver does not export its memory.
        """
        with self._exclusively("register") as driver:
            self._table.check_new(regions)
            found: dict[int, Allocation] = {}
            for region in sorted(regions, key=lambda each: each.address):
                _find_allocation(driver, region, found)
            self._allocations.update(found)
            self._table.add(regions)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Map the seed's allocations, and compare its identity."""
        with self._exclusively("connect", timeout_s) as driver:
            known = self._peers.pop(endpoint, None)
            if known is not None:
                known.unmap(driver)
            described = decode(endpoint)
            if (refusal := obstacle(described, self._boot)) is not None:
                raise EngineError(NAME, "connect", refusal, code="lane", retry_elsewhere=True, side="receiver")
            peer = map_peer(driver, described)
            try:
                self._copy(peer, [], "connect", time.monotonic() + timeout_s)
            except EngineError as error:
                if error.in_flight:  # only the identity, to memory of this engine
                    error.in_flight = False
                    self._late.append(peer)
                else:
                    peer.unmap(driver)
                raise
            self._peers[endpoint] = peer

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Queue the copies of all segments and wait for them."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("read", timeout_s):
            peer = self._peers.get(endpoint)
            if peer is None:
                raise not_connected(NAME, "read")
            self._table.check_local(segments)
            copies = peer.copies(segments, self._allocations)
            if not copies:
                return
            try:
                self._copy(peer, copies, "read", deadline)
            except EngineError as error:
                if error.in_flight:  # only `close` is left
                    self._calls.stuck = error.text
                raise

    def disconnect(self, endpoint: str) -> None:
        """Unmap the peer's memory; does nothing on an engine that is closed or stuck."""
        if self._driver is None or self._calls.stuck or endpoint not in self._peers:
            return
        with self._exclusively("connect") as driver:
            self._peers.pop(endpoint).unmap(driver)

    @property
    def registered_nbytes(self) -> int:
        """Bytes registered now, without the identity's page."""
        return self._table.nbytes

    def close(self) -> None:
        """Wait for the copies, unmap every peer and erase the identity. A read in another thread is given up first.

        Raises:
            EngineError: copies do not end (``in_flight``).
        """
        if self._driver is None:
            return
        with self._calls.last_turn():
            self._shut()

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusively(self, operation: str, timeout_s: float = 0.0) -> Iterator[Driver]:
        """The driver, for one caller at a time, with its context current on this thread."""
        with self._calls.turn(operation, timeout_s):
            driver = self._calls.usable(operation, self._driver)
            with driver.current(operation):
                yield driver

    def _stop_reason(self) -> str | None:
        return "the engine is closing" if self._calls.closing else None

    def _copy(self, peer: MappedPeer, copies: Sequence[tuple[int, int, int]], operation: str, deadline: float) -> None:
        """Make ``copies``, and compare the seed's identity after the last one: the same engine is still open."""
        assert self._streams is not None  # noqa: S101 - created with the driver
        try:
            self._streams.queue(copies)
            self._streams.queue_identity(peer.page)
        except EngineError:
            self._streams.wait(deadline, operation)  # the copies that were queued must not arrive later
            raise
        self._streams.wait(deadline, operation)
        if not self._streams.saw(peer.identity):
            raise EngineError(NAME, operation, "the seed has closed", retry_elsewhere=True, side="seed")

    def _shut(self) -> None:
        driver = self._driver
        if driver is None:  # another thread closed first
            return
        with driver.current("close"):
            streams = self._streams
            if streams is not None:
                streams.drain(self._calls.timeout_s)
            driver.write(self._page, bytes(IDENTITY_NBYTES), "close")
            for peer in (*self._peers.values(), *self._late):
                peer.unmap(driver)
            self._peers, self._late = {}, []
            driver.free(self._page)
            if streams is not None:
                streams.destroy()
        self._driver = None
        self._table.clear()
        self._allocations = {}
        driver.release()


def _find_allocation(driver: Driver, region: Region, found: dict[int, Allocation]) -> None:
    """Add the allocation that contains ``region`` to ``found``, by its base address."""
    base, nbytes = driver.allocation_of(region.address)
    if region.address + region.nbytes > base + nbytes:
        raise EngineError(NAME, "register", f"{region} does not lie in one allocation")
    if base in found:
        return
    try:
        found[base] = Allocation(base, nbytes, driver.export(base))
    except EngineError as error:
        problem = (
            f"the driver does not export the memory at {base:#x}: it exports no expandable segments (set "
            "expandable_segments:False in PYTORCH_CUDA_ALLOC_CONF), and no memory of pools or of sleep mode (start "
            "without enable_sleep_mode)"
        )
        raise EngineError(NAME, "register", problem, code=error.code) from error
