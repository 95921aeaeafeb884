"""YuanRong TransferEngine: the default engine on Ascend NPUs.

Both installable wheels work, ``openyuanrong-transfer-engine`` and ``openyuanrong-datasystem`` (never both in one
environment), and newer ones by what they show of themselves (:mod:`.yuanrong_native`).

What bounds a call. The installed wheels hold Python's GIL for the length of each native call, so the process stands
still meanwhile, and they set no limit on control calls. Therefore:

- ``limits`` keeps each read short;
- ``connect`` and every ``read`` first ask the peer's engine for a sign of life, with the GIL released;
- control calls go through a small relay process, which resets them after at most 10 s (:mod:`.yuanrong_relay`);
- in the data plane the engine itself gives up on an item that does not arrive within 10 s. Nothing shortens that wait,
  so a peer that stalls in the middle of a read costs up to 10 s with the GIL held, whatever ``timeout_s`` says.

What ``in_flight`` means here. A batch's receives are posted to the device before the seed is asked to send. Where a
read fails after that, some may still be filled. The engine takes them back in a thread of its own, which its
destructor waits for, so ``close`` gives the buffers back by destroying the engine. Where the failure was that
something did *not* come, that wait may have no end, and it would hold the GIL: then ``close`` keeps the native object
for the rest of the process's life, and the buffers with it, and says so.

``EngineConfig.device`` counts as the process sees its devices, within ``ASCEND_RT_VISIBLE_DEVICES``; ``cpu`` is for
the host stand-in of the tests. ``EngineConfig.options``: ``receive_wait_s``, the engine's own wait for an item, which
only the stand-in changes. There is neither TLS nor authentication on the engine's port: whoever reaches it and knows
an address reads weights.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_rfork.engines.base import EngineConfig, Limits, TransferEngine
from vllm_rfork.engines.refusals import busy, given_up, not_open
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.engines.yuanrong.native import (
    NAME,
    AclRuntime,
    Binding,
    NativeEngine,
    code_name,
    failure,
    load_binding,
)
from vllm_rfork.engines.yuanrong.peer import Relay, free_port, local_ipv4, parse_endpoint, probe
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

_PROTOCOL = "ascend"  # the one string that every generation accepts
_PORT_ATTEMPTS = 16
_CONTROL_BOUND_S = 10.0  # what the newest generation gives its control calls
_RECEIVE_WAIT_S = 10.0  # hard-coded in the engine
_NOT_READY_ATTEMPTS = 3
_NOT_READY_PAUSE_S = 0.2


@dataclass(frozen=True)
class _Peer:
    """A connected peer: where it is, what the engine is told instead, and how long a control call may take."""

    address: tuple[str, int]
    target: str
    relay: Relay | None
    bound_s: float


class YuanRongEngine(TransferEngine):
    """See the module's docstring."""

    name: ClassVar[str] = NAME
    device_types: ClassVar[frozenset[str]] = frozenset({"npu", "cpu"})
    # HIXL takes 4096 items a call. 128 MiB: a larger call gains nothing, a smaller one loses to its round trips.
    limits: ClassVar[Limits] = Limits(max_batch_nbytes=128 * 1024 * 1024, max_batch_items=4096)

    def __init__(self) -> None:
        self._native: NativeEngine | None = None
        self._binding: Binding | None = None
        self._acl: AclRuntime | None = None
        self._table = RegionTable(NAME)
        self._busy = threading.Lock()
        self._peers: dict[str, _Peer] = {}
        self._device = 0
        self._own = ""
        self._timeout_s = 30.0
        self._receive_wait_s = _RECEIVE_WAIT_S
        self._stuck = ""
        self._overdue = False

    # -- the port ------------------------------------------------------------------------------------------------

    @classmethod
    def self_check(cls) -> str:
        """Load the wheel and the Ascend runtime."""
        load_binding()
        if not AclRuntime().has_device_memory:
            return "its package and an Ascend runtime without device memory (a host stand-in) load"
        return "its package and the Ascend runtime load"

    def open(self, config: EngineConfig) -> None:
        """Start the engine on a free port of ``config.host``.

        Raises:
            EngineUnavailable: the wheel, a library it needs, or the Ascend runtime is missing.
            EngineError: the device or the host is not one the engine takes.
        """
        with self._exclusively("open", needs_engine=False):
            if self._native is not None:
                raise EngineError(NAME, "open", "it is open already")
            device = device_number(config.device)
            self._binding = load_binding()
            self._acl = AclRuntime()
            if config.device.partition(":")[0] == "cpu" and self._acl.has_device_memory:
                raise EngineError(
                    NAME, "open", "on a machine with an Ascend runtime it copies NPU memory, not the CPU's"
                )
            address = local_ipv4(config.host)
            self._native, port = _initialized(self._binding, address, device)
            self._device, self._own = device, f"{address}:{port}"
            self._timeout_s = config.timeout_s
            self._receive_wait_s = float(config.options.get("receive_wait_s", _RECEIVE_WAIT_S))
            self._stuck, self._overdue = "", False

    @property
    def endpoint(self) -> str:
        """``host:port``; says nothing about memory, so the installed base understands it."""
        if self._native is None:
            raise EngineError(NAME, "register", "it is not open")
        return self._own

    def register(self, regions: Sequence[Region]) -> None:
        """One native call, which the engine rolls back as a whole.

        With HIXL a registration disconnects every peer (register before advertising), and on its ``auto`` and ``hccs``
        routes a region has to begin at a multiple of 2 MiB.
        """
        with self._exclusively("register") as native:
            self._table.check_new(regions)
            if not regions:
                return
            if self._acl is not None:
                self._acl.ensure_context(self._device)
            addresses, lengths = [region.address for region in regions], [region.nbytes for region in regions]
            result = native.call("register", "batch_register_memory", addresses, lengths)
            if result.is_error():
                raise failure("register", result)
            self._table.add(regions)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Ask the peer's engine for a sign of life and, for the generations that need it, start the relay."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("connect", timeout_s):
            address = parse_endpoint(endpoint)
            self._forget(endpoint)
            probe(address, timeout_s, "connect", converse=self._converses)
            if not self._converses:
                self._peers[endpoint] = _Peer(address, endpoint, None, _CONTROL_BOUND_S)
                return
            bound_s = min(max(timeout_s, 1.0), _CONTROL_BOUND_S)
            relay = Relay(address, bound_s, max(1.0, deadline - time.monotonic()))
            self._peers[endpoint] = _Peer(address, relay.target, relay, bound_s)

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """One native call. ``timeout_s`` bounds the wait for the peer's sign of life; see the module's docstring.

        The engine asks the seed item by item, so a read that the seed does not authorize may have written the items
        before; only of a single item is it known that nothing was.
        """
        deadline = time.monotonic() + timeout_s
        with self._exclusively("read", timeout_s) as native:
            peer = self._peers.get(endpoint)
            if peer is None:
                raise EngineError(NAME, "read", "the peer is not connected", side="receiver")
            self._table.check_local(segments)
            if not segments:
                return
            probe(peer.address, timeout_s, "read", converse=self._converses)
            assert self._acl is not None  # noqa: S101 - set with the engine
            self._acl.ensure_context(self._device)
            local, remote, lengths = (list(column) for column in zip(*segments, strict=True))
            for attempt in range(_NOT_READY_ATTEMPTS):
                began = time.monotonic()
                result = native.call("read", "batch_transfer_sync_read", peer.target, local, remote, lengths)
                elapsed_s = time.monotonic() - began
                if not result.is_error():
                    return
                # The seed is busy with its side of the connection or, with HIXL, with a registration.
                last = attempt == _NOT_READY_ATTEMPTS - 1 or time.monotonic() + _NOT_READY_PAUSE_S > deadline
                if code_name(result) != "kNotReady" or last:
                    raise self._read_failure(result, peer, len(segments), elapsed_s)
                time.sleep(_NOT_READY_PAUSE_S)

    def disconnect(self, endpoint: str) -> None:
        """End the relay to the peer; the engine itself keeps its connection until it is closed."""
        with self._exclusively("connect", needs_engine=False):
            self._forget(endpoint)

    @property
    def registered_nbytes(self) -> int:
        """Bytes registered now."""
        return self._table.nbytes

    def close(self) -> None:
        """Finalize and destroy the engine; a new object is needed after it, which ``open`` makes."""
        with self._exclusively("close", needs_engine=False):
            if self._native is None:
                return
            for endpoint in list(self._peers):
                self._forget(endpoint)
            native, overdue = self._native, self._overdue
            self._native, self._own = None, ""
            self._table.clear()
            try:
                result = self._patiently(native, "close", "finalize")
            except EngineError as error:
                native.keep_forever()
                error.in_flight = True
                raise
            if overdue:
                native.keep_forever()
                raise EngineError(
                    NAME, "close", f"bytes of a read that was given up may still come ({self._stuck})", in_flight=True
                )
            native.destroy()
            if result.is_error():
                raise failure("close", result)

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusively(
        self, operation: str, timeout_s: float = 0.0, *, needs_engine: bool = True
    ) -> Iterator[NativeEngine]:
        """The native engine, for one caller at a time."""
        if not self._busy.acquire(timeout=timeout_s or self._timeout_s):
            raise busy(NAME, operation, in_flight=operation == "close")
        try:
            if needs_engine and self._native is None:
                raise not_open(NAME, operation)
            if needs_engine and self._stuck:
                raise given_up(NAME, operation, self._stuck)
            yield self._native  # type: ignore[misc]
        finally:
            self._busy.release()

    @property
    def _converses(self) -> bool:
        """Whether the adapter has to bound what the engine does not."""
        return self._binding is None or not self._binding.bounds_control_calls

    def _patiently(self, native: NativeEngine, operation: str, method: str, *arguments: Any) -> Any:
        """Call ``method`` again while it says kNotReady, as HIXL does under a peer's read, but not for ever."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            result = native.call(operation, method, *arguments)
            if code_name(result) != "kNotReady" or time.monotonic() > deadline:
                return result
            time.sleep(_NOT_READY_PAUSE_S)

    def _forget(self, endpoint: str) -> None:
        peer = self._peers.pop(endpoint, None)
        if peer is not None and peer.relay is not None:
            peer.relay.stop()

    def _read_failure(self, result: Any, peer: _Peer, items: int, elapsed_s: float) -> EngineError:
        code = code_name(result)
        untouched = (
            code == "kInvalid"  # arguments, before anything
            or (code == "kNotReady" and self._converses)  # no connection, so nothing was posted
            or (code == "kNotAuthorized" and items == 1)
        )
        error = failure("read", result, in_flight=not untouched, note=f"after {elapsed_s:.1f} s")
        if error.in_flight:
            self._stuck = error.text
            # Nine tenths: the engine's clock and this one are not the same.
            self._overdue = elapsed_s >= 0.9 * min(self._receive_wait_s, peer.bound_s)
        return error


def device_number(device: str, environment: dict[str, str] | None = None) -> int:
    """The engine's number for a torch device: its index among the devices that the process sees.

    Raises:
        EngineError: it is no NPU (nor the stand-in's ``cpu``), or there is none of that number.
    """
    kind, _, index = device.partition(":")
    if kind not in YuanRongEngine.device_types or (index and not index.isdigit()):
        raise EngineError(NAME, "open", f"it cannot read the memory of {device}")
    number = int(index or 0) if kind == "npu" else 0
    visible = (os.environ if environment is None else environment).get("ASCEND_RT_VISIBLE_DEVICES", "")
    listed = [entry.strip() for entry in visible.split(",")]
    if kind == "npu" and visible and all(entry.isdigit() for entry in listed) and number >= len(listed):
        raise EngineError(
            NAME, "open", f"{device} counts within ASCEND_RT_VISIBLE_DEVICES={visible}, which has {len(listed)} devices"
        )
    return number


def _initialized(binding: Binding, address: str, device: int) -> tuple[NativeEngine, int]:
    """A native engine that listens on ``address``, and its port.

    Between the look for a free port and the engine's bind somebody else may take it; then another one is tried.
    """
    last: EngineError | None = None
    for _ in range(_PORT_ATTEMPTS):
        port = free_port(address)
        native = NativeEngine(binding)
        result = native.call("open", "initialize", f"{address}:{port}", _PROTOCOL, f"npu:{device}")
        if not result.is_error():
            return native, port
        last = failure("open", result)
        if "bind" not in last.text and "port" not in last.text:
            break
    assert last is not None  # noqa: S101 - there was at least one attempt
    raise last
