"""CUDA IPC as a transfer engine: the seed's allocations are mapped into this process and copied on streams of its own.

Works between any two processes of one host, in whatever pid, ipc and mount namespaces, as long as the receiver's
container can open the seed's GPU. The seed takes no part in a read. A mapping keeps the memory alive: a read goes on
when the seed's process is killed, and the digests decide whether the bytes count. A seed that closes in an orderly way
erases its identity, which every read checks afterwards.

Not for memory of expandable segments, memory pools or vLLM's sleep mode: the driver exports none of it.
"""

from __future__ import annotations

import ctypes
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_rfork.engines.base import EngineConfig, Limits, TransferEngine
from vllm_rfork.engines.cuda_ipc.driver import NAME, Driver
from vllm_rfork.engines.cuda_ipc.endpoint import (
    IDENTITY_NBYTES,
    Allocation,
    Endpoint,
    RangeMap,
    boot_id,
    decode,
    encode,
)
from vllm_rfork.engines.refusals import busy, given_up, not_open
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

#: Of the identity's allocation; the driver gives no less.
_PAGE_NBYTES = 4096
#: Copies of one stream follow each other with a gap of some microseconds; those of several fill each other's gaps. On
#: two H200, 14 GiB in 2000 tensors read at 257 GB/s with one.
_STREAMS = 4
#: Between two looks at the streams, in seconds. A batch of 2 GiB takes 5 ms.
_PAUSE_S = 0.00005


@dataclass(frozen=True)
class _Peer:
    """A connected seed and where its allocations are mapped; ``page`` is the address of its identity here."""

    endpoint: Endpoint
    page: int
    mapped: tuple[int, ...]
    regions: RangeMap
    allocations: RangeMap


class CudaIpcEngine(TransferEngine):
    """See the module's docstring."""

    name: ClassVar[str] = NAME
    device_types: ClassVar[frozenset[str]] = frozenset({"cuda"})
    # 2 GiB take 5 ms over NVLink: long enough that the pause after a batch costs nothing, short enough that the digests
    # of one batch are taken while the next is read.
    limits: ClassVar[Limits] = Limits(max_batch_nbytes=2 * 1024**3, max_batch_items=65536)

    def __init__(self) -> None:
        self._driver: Driver | None = None
        self._busy = threading.Lock()
        self._closing = False
        self._stuck = ""
        self._table = RegionTable(NAME)
        self._allocations: dict[int, Allocation] = {}
        self._peers: dict[str, _Peer] = {}
        self._streams: tuple[Any, ...] = ()
        self._page = 0
        self._identity = b""
        # Part of the object: a copy that was given up may still write to it.
        self._seen = ctypes.create_string_buffer(IDENTITY_NBYTES)
        self._boot = ""
        self._timeout_s = 30.0

    # -- the port ------------------------------------------------------------------------------------------------

    @classmethod
    def self_check(cls) -> str:
        """Load the driver and retain the first device's context."""
        Driver(0).release()
        return "the CUDA driver loads, and there is a device"

    def open(self, config: EngineConfig) -> None:
        """Retain the device's primary context and make streams: milliseconds where torch has the context already.

        Raises:
            EngineUnavailable: there is no CUDA driver.
            EngineError: there is no such device.
        """
        kind, _, index = config.device.partition(":")
        if kind != "cuda":
            raise EngineError(NAME, "open", f"it cannot read the memory of {config.device}")
        with self._exclusively("open", needs_driver=False):
            if self._driver is not None:
                raise EngineError(NAME, "open", "it is open already")
            boot = boot_id()
            driver = Driver(int(index or 0))
            self._identity = uuid.uuid4().bytes
            with driver.current("open"):
                self._streams = tuple(driver.new_stream() for _ in range(_STREAMS))
                self._page = driver.allocate(_PAGE_NBYTES)
                driver.write(self._page, self._identity)
            self._boot, self._timeout_s = boot, config.timeout_s
            self._closing, self._stuck = False, ""
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
        """Find the allocation of each region and its handle; 10 µs each, whatever their size.

        Raises:
            EngineError: a region is not in one allocation of this device, or the driver does not export its memory.
        """
        with self._exclusively("register") as driver:
            self._table.check_new(regions)
            found: dict[int, Allocation] = {}
            for region in sorted(regions, key=lambda each: each.address):
                self._find_allocation(driver, region, found)
            self._allocations.update(found)
            self._table.add(regions)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Map the seed's allocations, and check that it is still open."""
        with self._exclusively("connect", timeout_s) as driver:
            known = self._peers.pop(endpoint, None)
            if known is not None:
                self._unmap(driver, known)
            peer = decode(endpoint)
            if peer.boot != self._boot:
                raise EngineError(
                    NAME, "connect", "the seed is on another host", code="lane", retry_elsewhere=True, side="receiver"
                )
            mapped: list[int] = []
            try:
                for each in (peer.page, *peer.allocations):
                    mapped.append(driver.open_handle(each.handle))
                    _check_length(driver, mapped[-1], each)
                connected = _Peer(
                    peer,
                    mapped[0],
                    tuple(mapped[1:]),
                    RangeMap(peer.regions),
                    RangeMap([(each.base, each.nbytes) for each in peer.allocations]),
                )
                self._check_identity(driver, connected, "connect", time.monotonic() + timeout_s)
            except EngineError as error:
                error.in_flight = False
                for address in mapped:
                    with suppress(EngineError):  # the first error is the one that tells
                        driver.close_handle(address)
                raise
            self._peers[endpoint] = connected

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Queue one copy a segment on the own streams and wait for all of them."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("read", timeout_s) as driver:
            peer = self._peers.get(endpoint)
            if peer is None:
                raise EngineError(NAME, "read", "the peer is not connected", side="receiver")
            self._table.check_local(segments)
            copies = [(each.local, _address_here(peer, each), each.nbytes) for each in segments]
            if not copies:
                return
            try:
                for number, (to, source, nbytes) in enumerate(copies):
                    driver.copy(self._streams[number % _STREAMS], to, source, nbytes)
            except EngineError:
                self._wait(driver, deadline, "read")  # those that were queued must not arrive later
                raise
            self._wait(driver, deadline, "read")
            self._check_identity(driver, peer, "read", deadline)

    def disconnect(self, endpoint: str) -> None:
        """Unmap the peer's memory; on an engine that is closed or stuck there is nothing to do."""
        if self._driver is None or self._stuck or endpoint not in self._peers:
            return
        with self._exclusively("connect") as driver:
            self._unmap(driver, self._peers.pop(endpoint))

    @property
    def registered_nbytes(self) -> int:
        """Bytes registered now, the identity's page not counted."""
        return self._table.nbytes

    def close(self) -> None:
        """Wait for the stream, unmap every peer and erase the identity. A read in another thread is given up first.

        Raises:
            EngineError: copies do not end (``in_flight``).
        """
        if self._driver is None:
            return
        self._closing = True
        if not self._busy.acquire(timeout=self._timeout_s):
            raise EngineError(NAME, "close", "a native call does not return", code="timeout", in_flight=True)
        try:
            self._shut()
        finally:
            self._busy.release()

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusively(self, operation: str, timeout_s: float = 0.0, *, needs_driver: bool = True) -> Iterator[Driver]:
        """The driver, with its context on this thread, for one caller at a time."""
        if not self._busy.acquire(timeout=timeout_s or self._timeout_s):
            raise busy(NAME, operation, retry_elsewhere=True)
        try:
            if not needs_driver:
                yield self._driver  # type: ignore[misc]
                return
            if self._driver is None or self._closing:
                raise not_open(NAME, operation)
            if self._stuck:
                raise given_up(NAME, operation, self._stuck)
            with self._driver.current(operation):
                yield self._driver
        finally:
            self._busy.release()

    def _find_allocation(self, driver: Driver, region: Region, found: dict[int, Allocation]) -> None:
        base, nbytes = driver.allocation_of(region.address)
        if region.address + region.nbytes > base + nbytes:
            raise EngineError(NAME, "register", f"{region} does not lie in one allocation")
        if base in found:
            return
        try:
            found[base] = Allocation(base, nbytes, driver.export(base))
        except EngineError as error:
            problem = (
                f"the driver does not share the memory at {base:#x}: expandable segments, memory pools and sleep mode "
                "cannot be forked by this engine"
            )
            raise EngineError(NAME, "register", problem, code=error.code) from error

    def _wait(self, driver: Driver, deadline: float, operation: str) -> None:
        """Until the streams are empty.

        Raises:
            EngineError: a copy failed, or they take too long: then bytes may still arrive.
        """
        while not self._is_idle(driver):
            if time.monotonic() >= deadline or self._closing:
                why = "the engine is closing" if self._closing else "the copies did not end in time"
                self._stuck = why
                raise EngineError(
                    NAME,
                    operation,
                    why,
                    code="timeout",
                    in_flight=True,
                    retry_elsewhere=True,
                    side="unknown",
                )
            time.sleep(_PAUSE_S)

    def _is_idle(self, driver: Driver) -> bool:
        return all(driver.is_idle(stream) for stream in self._streams)

    def _check_identity(self, driver: Driver, peer: _Peer, operation: str, deadline: float) -> None:
        """Compare the peer's first bytes with the identity that its endpoint names: it is open, and the same engine."""
        driver.copy(self._streams[0], ctypes.addressof(self._seen), peer.page, IDENTITY_NBYTES)
        self._wait(driver, deadline, operation)
        if self._seen.raw != peer.endpoint.identity:
            raise EngineError(
                NAME,
                operation,
                "the seed has closed",
                retry_elsewhere=True,
                side="seed",
            )

    def _unmap(self, driver: Driver, peer: _Peer) -> None:
        for address in (peer.page, *peer.mapped):
            driver.close_handle(address)

    def _shut(self) -> None:
        driver = self._driver
        if driver is None:  # another thread closed first
            return
        with driver.current("close"):
            self._wait_for_the_last_copy(driver)
            driver.write(self._page, bytes(IDENTITY_NBYTES), "close")
            for peer in self._peers.values():
                self._unmap(driver, peer)
            self._peers = {}
            driver.free(self._page)
            for stream in self._streams:
                driver.destroy_stream(stream)
        self._driver = None
        self._table.clear()
        self._allocations = {}
        driver.release()

    def _wait_for_the_last_copy(self, driver: Driver) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                if self._is_idle(driver):
                    return
            except EngineError:  # a copy failed: the context is lost, and nothing in it writes any more
                return
            if time.monotonic() >= deadline:
                raise EngineError(NAME, "close", "the copies of a read do not end", code="timeout", in_flight=True)
            time.sleep(_PAUSE_S)


def _check_length(driver: Driver, address: int, allocation: Allocation) -> None:
    """Compare what is mapped at ``address`` with what the seed's endpoint says of it.

    A copy beyond the mapping fails as well, but by then some bytes have been written.

    Raises:
        EngineError: it is shorter.
    """
    base, nbytes = driver.allocation_of(address, "connect")
    if base + nbytes - address < allocation.nbytes:
        raise EngineError(
            NAME,
            "connect",
            f"the seed's allocation at {allocation.base:#x} has {base + nbytes - address} bytes, and its endpoint says "
            f"{allocation.nbytes}",
            retry_elsewhere=True,
            side="seed",
        )


def _address_here(peer: _Peer, segment: Segment) -> int:
    """Where the segment's remote bytes are mapped in this process.

    Raises:
        EngineError: they do not lie in one registered region of the seed.
    """
    number = peer.allocations.containing(segment.remote, segment.nbytes)
    if number is None or peer.regions.containing(segment.remote, segment.nbytes) is None:
        raise EngineError(
            NAME,
            "read",
            f"{segment.nbytes} bytes at the seed's address {segment.remote:#x} do not lie in one registered region",
            side="seed",
        )
    return peer.mapped[number] + segment.remote - peer.endpoint.allocations[number].base
