"""The memory engine: host memory of one machine, without a native package, and with faults on request.

For tests and demos. It works within a process and between processes of one user (``process_vm_readv``), keeps the
port's contract, and fails as told. Not for production: only the equal uid of the two processes protects the memory.

Faults come from the constructor, or, for an engine that is created by name, from ``RFORK_MEMORY_FAULT``: a
comma-separated list that is read at ``open``, such as ``register_fails`` or ``flip_byte=17,fail_read=2``. The names are
the fields of :class:`Faults`.

The endpoint contains the process and the address of the engine's table of registrations. The reader fetches that table
for each read, so it notices a peer that closed or died, and refuses memory that the peer has not registered.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from vllm_rfork.engines.base import EngineConfig, Limits, Place, TransferEngine
from vllm_rfork.engines.process_memory import process_started, read_process
from vllm_rfork.engines.refusals import not_connected
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.errors import ConfigError, EngineError, Side
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

FAULT_VARIABLE = "RFORK_MEMORY_FAULT"
_NAME = "memory"
_HEADER = struct.Struct("=16sQQ")  # the engine's id, the table's address, the number of regions in it
_ROW = struct.Struct("=QQ")
_MAX_REGIONS = 1 << 20
#: The side that failed when another process cannot be read: it ended, or this process has no permission.
_SIDES: dict[int, Side] = {errno.ESRCH: "seed", errno.EPERM: "receiver", errno.ENOMEM: "receiver"}


@dataclass(frozen=True)
class Faults:
    """Faults of one engine object.

    Attributes:
        open_fails, register_fails, connect_fails: the call raises ``EngineError``.
        close_fails: ``close`` raises with ``in_flight=True``, each time.
        fail_read: the read of this number (from 1) raises, having copied half of its bytes.
        flip_byte: the byte of this number (from 0, over all reads) arrives with its lowest bit flipped.
        truncate_read: the read of this number (from 1) copies all but its last byte and reports success.
        stall_read: the read of this number (from 1) copies nothing, waits until its deadline and raises.
        late_read: the read of this number (from 1) raises at its deadline with ``in_flight=True``; its bytes land
            ``late_s`` seconds later unless ``close`` comes first.
    """

    open_fails: bool = False
    register_fails: bool = False
    connect_fails: bool = False
    close_fails: bool = False
    fail_read: int = 0
    flip_byte: int = -1
    truncate_read: int = 0
    stall_read: int = 0
    late_read: int = 0
    late_s: float = 0.2


def parse_faults(text: str) -> Faults:
    """``Faults`` from the variable's text.

    Raises:
        ConfigError: a fault of that name does not exist, or its value is not a number.
    """
    types = {field.name: type(getattr(Faults(), field.name)) for field in fields(Faults)}
    given: dict[str, bool | int | float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if name not in types:
            raise ConfigError(FAULT_VARIABLE, f"there is no fault {name!r}", ", ".join(types))
        try:
            given[name] = types[name](float(value or "1"))
        except ValueError as error:
            raise ConfigError(FAULT_VARIABLE, f"{name} has no number {value!r}", "name=number") from error
    return Faults(**given)  # type: ignore[arg-type]


class _Peer:
    """Another engine: its process, and access to its memory."""

    def __init__(self, endpoint: str) -> None:
        try:
            scheme, pid, started, header, identity = endpoint.split(":")
            self.pid, self.started, self.header = int(pid), int(started), int(header)
            self.identity = bytes.fromhex(identity)
        except ValueError as error:
            raise EngineError(
                _NAME, "connect", f"{endpoint[:100]!r} is not an endpoint of this engine", side="seed"
            ) from error
        if scheme != _NAME or len(self.identity) != 16 or self.pid <= 0 or self.header <= 0:
            raise EngineError(_NAME, "connect", f"{endpoint[:100]!r} is not an endpoint of this engine", side="seed")

    def regions(self, operation: str) -> RegionTable:
        """The peer's current registrations."""
        if process_started(self.pid) != self.started:
            raise EngineError(_NAME, operation, f"process {self.pid} is gone", retry_elsewhere=True, side="seed")
        header = ctypes.create_string_buffer(_HEADER.size)
        self.copy(operation, ctypes.addressof(header), self.header, _HEADER.size)
        identity, address, count = _HEADER.unpack(header.raw)
        if identity != self.identity or count > _MAX_REGIONS:
            raise EngineError(
                _NAME, operation, f"the engine in process {self.pid} is closed", retry_elsewhere=True, side="seed"
            )
        table = RegionTable(_NAME)
        if count:
            rows = ctypes.create_string_buffer(_ROW.size * count)
            self.copy(operation, ctypes.addressof(rows), address, _ROW.size * count)
            table.add(Region(*row) for row in _ROW.iter_unpack(rows.raw))
        return table

    def copy(self, operation: str, local: int, remote: int, nbytes: int) -> None:
        """Copy from the peer's memory, this process's too: a plain copy from an address that is a lie would crash."""
        try:
            read_process(self.pid, local, remote, nbytes)
        except OSError as error:
            raise EngineError(
                _NAME,
                operation,
                f"process {self.pid}: {error.strerror}",
                code=str(error.errno),
                retry_elsewhere=True,
                side=_SIDES.get(error.errno or 0, "unknown"),
            ) from error


class _Late:
    """A read whose bytes arrive after it was abandoned."""

    def __init__(self, delay_s: float, peer: _Peer, segments: Sequence[Segment]) -> None:
        self._cancelled = threading.Event()
        self._delay_s, self._peer, self._segments = delay_s, peer, list(segments)
        self._thread = threading.Thread(target=self._run, name="rfork-memory-late", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if not self._cancelled.wait(self._delay_s):
            for local, remote, nbytes in self._segments:
                self._peer.copy("read", local, remote, nbytes)

    def stop(self) -> None:
        """Cancel, and return when nothing more will be written."""
        self._cancelled.set()
        self._thread.join()


class MemoryEngine(TransferEngine):
    """See the module's docstring; with ``faults`` None, ``open`` reads them from the environment."""

    name: ClassVar[str] = _NAME
    device_types: ClassVar[frozenset[str]] = frozenset({"cpu"})
    opens_quickly: ClassVar[bool] = True
    limits: ClassVar[Limits] = Limits(max_batch_nbytes=64 * 1024 * 1024, max_batch_items=4096)

    def __init__(self, faults: Faults | None = None) -> None:
        self._given_faults = faults
        self.faults = faults or Faults()
        self._table = RegionTable(_NAME)
        self._identity = b""
        self._header = ctypes.create_string_buffer(_HEADER.size)
        self._rows = ctypes.create_string_buffer(_ROW.size)
        self._peers: dict[str, _Peer] = {}
        self._late: list[_Late] = []
        self._reads = 0
        self._bytes_read = 0

    @classmethod
    def lane_to(cls, place: Place, device_type: str) -> str:
        """It reads processes of its own pid namespace."""
        if place != "container":
            raise EngineError(_NAME, "connect", "the seed is in another pid namespace", code="lane", side="receiver")
        return _NAME

    def open(self, config: EngineConfig) -> None:
        """Read the faults from the environment if none were given, and start."""
        if self._identity:
            raise EngineError(_NAME, "open", "it is open already")
        if config.device != "cpu":
            raise EngineError(_NAME, "open", f"it reads host memory only, not {config.device}")
        self.faults = self._given_faults or parse_faults(os.environ.get(FAULT_VARIABLE, ""))
        self._fault("open", self.faults.open_fails)
        self._identity = uuid.uuid4().bytes
        self._reads = self._bytes_read = 0
        self._publish()

    @property
    def endpoint(self) -> str:
        """``memory:pid:start time:address of the table's header:id``."""
        self._require_open("open")
        pid, header = os.getpid(), ctypes.addressof(self._header)
        return f"{_NAME}:{pid}:{process_started(pid)}:{header}:{self._identity.hex()}"

    def register(self, regions: Sequence[Region]) -> None:
        """Let peers read ``regions``."""
        self._require_open("register")
        self._fault("register", self.faults.register_fails)
        self._table.check_new(regions)
        self._table.add(regions)
        self._publish()

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Find the peer's table; costs one read of its memory, so ``timeout_s`` is never reached."""
        self._require_open("connect")
        self._fault("connect", self.faults.connect_fails)
        peer = _Peer(endpoint)
        peer.regions("connect")
        self._peers[endpoint] = peer

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Copy the segments one after another; see :class:`Faults` for what else may happen."""
        self._require_open("read")
        peer = self._peers.get(endpoint)
        if peer is None:
            raise not_connected(_NAME, "read")
        deadline = time.monotonic() + timeout_s
        self._table.check_local(segments)
        remote = peer.regions("read")
        for segment in segments:
            if not remote.holds(segment.remote, segment.nbytes):
                raise EngineError(
                    _NAME,
                    "read",
                    f"{segment.nbytes} bytes at remote address {segment.remote:#x} do not lie in one registered region",
                    side="seed",
                )
        self._reads += 1
        if self._reads == self.faults.stall_read:
            time.sleep(max(0.0, deadline - time.monotonic()))
            raise EngineError(_NAME, "read", f"no answer within {timeout_s} s (a fault asked for)", side="unknown")
        if self._reads == self.faults.late_read:
            time.sleep(max(0.0, deadline - time.monotonic()))
            self._late.append(_Late(self.faults.late_s, peer, segments))
            raise EngineError(
                _NAME,
                "read",
                f"not done within {timeout_s} s (a fault asked for)",
                in_flight=True,
                side="unknown",
            )
        self._copy(peer, segments, deadline)

    def _copy(self, peer: _Peer, segments: Sequence[Segment], deadline: float) -> None:
        total = sum(segment.nbytes for segment in segments)
        stop_at = {self.faults.fail_read: total // 2, self.faults.truncate_read: total - 1}.get(self._reads, total)
        done = 0
        for local, remote, nbytes in segments:
            take = min(nbytes, stop_at - done)
            if take > 0:
                if time.monotonic() > deadline:
                    raise EngineError(_NAME, "read", "not done in time", retry_elsewhere=True, side="unknown")
                peer.copy("read", local, remote, take)
                self._flip(local, take)
                done += take
                self._bytes_read += take
        self._fault("read", self._reads == self.faults.fail_read)

    def _flip(self, local: int, nbytes: int) -> None:
        where = self.faults.flip_byte - self._bytes_read
        if 0 <= where < nbytes:
            ctypes.c_ubyte.from_address(local + where).value ^= 1

    def disconnect(self, endpoint: str) -> None:
        """Forget the peer."""
        self._peers.pop(endpoint, None)

    @property
    def registered_nbytes(self) -> int:
        """Bytes that peers may read now."""
        return self._table.nbytes

    def close(self) -> None:
        """Stop late deliveries, then drop everything."""
        for late in self._late:
            late.stop()
        self._late = []
        if self._identity:
            self._fault("close", self.faults.close_fails, in_flight=True)
        self._identity = b""
        self._peers = {}
        self._table.clear()
        self._publish()

    def _publish(self) -> None:
        """Write the table for peers; the rows are complete before the header refers to them."""
        rows = b"".join(_ROW.pack(region.address, region.nbytes) for region in self._table.regions)
        previous, self._rows = self._rows, ctypes.create_string_buffer(rows, max(len(rows), 1))
        packed = _HEADER.pack(self._identity, ctypes.addressof(self._rows), len(rows) // _ROW.size)
        ctypes.memmove(self._header, packed, len(packed))
        del previous

    def _require_open(self, operation: str) -> None:
        if not self._identity:
            raise EngineError(_NAME, operation, "it is not open", side="receiver")

    def _fault(self, operation: str, wanted: bool, *, in_flight: bool = False) -> None:
        if wanted:
            raise EngineError(_NAME, operation, "a fault was asked for", in_flight=in_flight, side=None)
