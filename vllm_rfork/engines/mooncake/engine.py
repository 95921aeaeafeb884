"""Mooncake TransferEngine: RDMA or TCP between any two processes, in any namespaces, and Ascend's transport on NPUs.

The protocol is chosen when the engine is opened: Ascend's on an NPU, RDMA (or AWS EFA) if this process can use such a
device, else TCP. Both sides need the same. ``MC_FORCE_TCP=1``, Mooncake's own variable, selects TCP.

A seed survives receivers that die in the middle of a read, and refuses addresses outside its registrations. But
Mooncake does not authenticate: a process that reaches its two TCP ports (between 15000 and 17000, on all interfaces)
can read the registered memory and write to it. The network must keep strangers away.

``in_flight``. Mooncake reports a failed read without a reason, while other items of the batch may still arrive. After
such a read, and after one that did not return in time, only ``close`` is left. It waits for the native call, which
Mooncake ends by itself after 30 s (``MC_TRANSFER_TIMEOUT``, ``MC_TCP_PROGRESS_TIMEOUT_SEC``), and destroys the engine:
then no byte arrives any more. The destructor holds the GIL, for up to a second.

Settings: Mooncake's own variables.
"""

from __future__ import annotations

import ctypes
import mmap
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from vllm_rfork.engines import host
from vllm_rfork.engines.base import EngineConfig, Limits, Place, TransferEngine
from vllm_rfork.engines.mooncake.endpoint import (
    IDENTITY_NBYTES,
    NAME,
    Endpoint,
    decode,
    encode,
    obstacle,
    own_protocol,
    tcp_reason,
)
from vllm_rfork.engines.mooncake.native import Bound, NativeEngine, load_engine_class
from vllm_rfork.engines.mooncake.pieces import items
from vllm_rfork.engines.mooncake.spans import Spans
from vllm_rfork.engines.mooncake.wheels import device_of_machine
from vllm_rfork.engines.one_caller import OneCaller
from vllm_rfork.engines.refusals import not_connected, still_called
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

#: More items in one native call fail without a reason.
_MAX_ITEMS = 1000
#: An abandoned probe may still arrive; the next one uses another slot.
_SLOTS = mmap.PAGESIZE // IDENTITY_NBYTES - 1


@dataclass(frozen=True)
class _Peer:
    """A connected peer and its registered regions."""

    endpoint: Endpoint
    regions: RegionTable


class MooncakeEngine(TransferEngine):
    """See the module's docstring."""

    name: ClassVar[str] = NAME
    device_types: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda", "npu"})
    # Each batch is several native calls, which no deadline interrupts; over TCP they have at most 250 MiB each.
    limits: ClassVar[Limits] = Limits(
        max_batch_nbytes=256 * 1024**2, max_batch_items=4096, largest_batch_nbytes=1024**3
    )

    def __init__(self) -> None:
        self._native: NativeEngine | None = None
        self._table = RegionTable(NAME)
        self._spans = Spans()
        self._calls = OneCaller(NAME)
        self._peers: dict[str, _Peer] = {}
        self._own: Endpoint | None = None
        # Peers compare the first slot; the others receive what is read from the peers' first slots.
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self._page_at = 0
        self._probes = 0

    # -- the port ------------------------------------------------------------------------------------------------

    @classmethod
    def self_check(cls) -> str:
        """Load the wheel for this machine's devices; open an engine for host memory and close it."""
        load_engine_class(device_of_machine())
        engine = cls()
        engine.open(EngineConfig(device="cpu"))
        engine.close()
        protocol = own_protocol("cpu")
        return f"an engine opens, over {protocol}" + (f" ({why})" if (why := tcp_reason()) else "")

    @classmethod
    def lane_to(cls, place: Place, device_type: str) -> str:
        """The same to every place."""
        return f"{NAME}/{own_protocol(device_type)}"

    @classmethod
    def lane_obstacle(cls, endpoint: str, config: EngineConfig) -> str | None:
        """Another kind of memory, another protocol, or another host's loopback address."""
        return obstacle(decode(endpoint), config.device.partition(":")[0])

    def open(self, config: EngineConfig) -> None:
        """Start an engine that peers reach under ``config.host``: a few milliseconds after the first import.

        Raises:
            EngineUnavailable: there is no wheel for the device, or a library is missing.
            EngineError: the host is not an IPv4 address of this machine, or Mooncake does not start.
        """
        kind = config.device.partition(":")[0]
        if kind not in self.device_types:
            raise EngineError(NAME, "open", f"this engine cannot read the memory of {config.device}")
        with self._calls.turn("open"):
            if self._native is not None:
                raise EngineError(NAME, "open", "it is open already")
            address = host.local_ipv4(NAME, config.host)
            protocol, identity = own_protocol(kind), uuid.uuid4().bytes
            self._calls.opened(config.timeout_s)
            page = mmap.mmap(-1, mmap.PAGESIZE)
            page[:IDENTITY_NBYTES] = identity
            at = ctypes.addressof(ctypes.c_char.from_buffer(page))
            native = NativeEngine(load_engine_class(kind), config.device, page)
            bound = self._bound(config.timeout_s)
            try:
                port = native.initialize(address, protocol, bound)
                _register(native, [Region(at, len(page))], bound)
            except EngineError:
                native.destroy(0.0)  # it listens already; after a call that goes on, it ends with that call
                raise
            self._native, self._page, self._page_at = native, page, at
            self._own = Endpoint(
                session=f"{address}:{port}",
                protocol=protocol,
                memory=kind,
                boot=host.boot_id_if_known(),
                identity=identity,
                identity_at=at,
                regions=[],
            )

    @property
    def endpoint(self) -> str:
        """JSON of :class:`~vllm_rfork.engines.mooncake.endpoint.Endpoint`; about 30 bytes for each region."""
        with self._exclusively("register"):
            regions = [(region.address, region.nbytes) for region in self._table.regions]
            return encode(msgspec.structs.replace(self._opened(), regions=regions))

    def register(self, regions: Sequence[Region]) -> None:
        """Register ``regions``, neighbours in host memory as one (:mod:`.spans`)."""
        with self._exclusively("register") as native:
            self._table.check_new(regions)
            spans = self._spans.new(regions, merge=self._opened().memory == "cpu")
            if spans:
                self._remembering(lambda: _register(native, spans, self._bound(self._calls.timeout_s)))
            self._spans.add(spans)
            self._table.add(regions)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Refuse a lane that does not exist, and compare the peer's identity: Mooncake connects in the first read."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("connect", timeout_s) as native:
            self._peers.pop(endpoint, None)
            peer = decode(endpoint)
            why = obstacle(peer, self._opened().memory)
            if why is not None:
                raise EngineError(NAME, "connect", why, code="lane", retry_elsewhere=True, side="receiver")
            self._check_identity(native, peer, "connect", deadline)
            regions = RegionTable(NAME)
            regions.add(Region(*region) for region in peer.regions)
            self._peers[endpoint] = _Peer(peer, regions)

    def lane(self, endpoint: str) -> str:
        """``mooncake/rdma``, ``mooncake/tcp``, ``mooncake/efa`` or ``mooncake/ascend``."""
        peer = self._peers.get(endpoint)
        return NAME if peer is None else f"{NAME}/{peer.endpoint.protocol}"

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Read the batch in native calls of at most 1,000 items, then compare the seed's identity."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("read", timeout_s) as native:
            peer = self._peers.get(endpoint)
            if peer is None:
                raise not_connected(NAME, "read")
            self._table.check_local(segments)
            _check_remote(peer, segments)
            if not segments:
                return
            self._remembering(lambda: self._read(native, peer.endpoint, segments, deadline))

    def disconnect(self, endpoint: str) -> None:
        """Forget the peer; Mooncake keeps its connections until the engine is closed."""
        self._peers.pop(endpoint, None)

    @property
    def registered_nbytes(self) -> int:
        """Bytes registered now, without the engine's own page."""
        return self._table.nbytes

    def close(self) -> None:
        """Erase the identity, wait for native calls, and destroy the engine. A read in another thread is given up.

        Raises:
            EngineError: a native call does not return (``in_flight``); the engine ends when it does.
        """
        if self._native is None:
            return
        with self._calls.last_turn():
            self._destroy()

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusively(self, operation: str, timeout_s: float = 0.0) -> Iterator[NativeEngine]:
        """The native engine, for one caller at a time."""
        with self._calls.turn(operation, timeout_s):
            yield self._calls.usable(operation, self._native)

    def _destroy(self) -> None:
        native = self._native
        if native is None:  # another thread closed first
            return
        # A peer that still has this engine's endpoint must not read later memory as weights.
        self._page[:IDENTITY_NBYTES] = bytes(IDENTITY_NBYTES)
        self._own, self._peers = None, {}
        self._table.clear()
        self._spans.clear()
        if not native.destroy(self._calls.timeout_s):
            raise still_called(NAME)
        self._native = None

    def _opened(self) -> Endpoint:
        assert self._own is not None  # noqa: S101 - set with the native engine
        return self._own

    def _bound(self, timeout_s: float) -> Bound:
        return Bound(time.monotonic() + timeout_s, lambda: self._calls.closing)

    def _remembering(self, call: Callable[[], None]) -> None:
        """``call``; if it leaves something in flight, only ``close`` is left."""
        try:
            call()
        except EngineError as error:
            if error.in_flight:
                self._calls.stuck = error.text
            raise

    def _read(self, native: NativeEngine, peer: Endpoint, segments: Sequence[Segment], deadline: float) -> None:
        for part in items(segments, peer.protocol, _MAX_ITEMS):
            columns = zip(*part, strict=True)
            self._transfer(native, peer, "read", [list(column) for column in columns], deadline)
        self._check_identity(native, peer, "read", deadline)

    def _transfer(
        self, native: NativeEngine, peer: Endpoint, operation: str, columns: Sequence[list[int]], deadline: float
    ) -> None:
        """One native read; ``columns`` are local addresses, remote addresses and lengths."""
        bound = Bound(deadline, lambda: self._calls.closing)
        code = native.call(operation, "batch_transfer_sync_read", peer.session, *columns, bound=bound)
        if code != 0:
            raise EngineError(
                NAME,
                operation,
                f"the engine at {peer.session} cannot be reached, or refuses; Mooncake's own log has the reason",
                code=str(code),
                in_flight=operation == "read",
                retry_elsewhere=True,
                side="unknown",
            )

    def _check_identity(self, native: NativeEngine, peer: Endpoint, operation: str, deadline: float) -> None:
        """Read the peer's identity into a slot of this engine's page: the same engine is still open."""
        self._probes += 1
        offset = IDENTITY_NBYTES * (1 + self._probes % _SLOTS)
        self._page[offset : offset + IDENTITY_NBYTES] = bytes(IDENTITY_NBYTES)
        columns = [[self._page_at + offset], [peer.identity_at], [IDENTITY_NBYTES]]
        self._transfer(native, peer, operation, columns, deadline)
        if self._page[offset : offset + IDENTITY_NBYTES] != peer.identity:
            raise EngineError(NAME, operation, "the seed has closed", retry_elsewhere=True, side="seed")


def _register(native: NativeEngine, spans: Sequence[Region], bound: Bound) -> None:
    """Register ``spans`` in one native call, which registers all or none."""
    addresses, lengths = [span.address for span in spans], [span.nbytes for span in spans]
    code = native.call("register", "batch_register_memory", addresses, lengths, bound=bound)
    if code != 0:
        problem = "Mooncake cannot register the memory; its own log has the reason"
        raise EngineError(NAME, "register", problem, code=str(code))


def _check_remote(peer: _Peer, segments: Sequence[Segment]) -> None:
    """Raise :class:`EngineError` if no single registered region of the peer contains the remote side of a segment."""
    for segment in segments:
        if not peer.regions.holds(segment.remote, segment.nbytes):
            raise EngineError(
                NAME,
                "read",
                f"{segment.nbytes} bytes at the seed's address {segment.remote:#x} do not lie in one registered region",
                side="seed",
            )
