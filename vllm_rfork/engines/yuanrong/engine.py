"""YuanRong TransferEngine: the default engine on Ascend NPUs.

Both wheels work, ``openyuanrong-transfer-engine`` and ``openyuanrong-datasystem`` (never both in one environment).
Newer generations are recognized by their members (:mod:`.native`). The newest chooses its port itself, within
``YR_TE_RPC_PORT_MIN`` and ``YR_TE_RPC_PORT_MAX``, and has a route, which may require aligned regions (:mod:`.routes`).

Bounds. The wheels hold Python's GIL during each native call, so the whole process waits, and they do not limit control
calls. Therefore:

- ``limits`` keeps each read short;
- ``connect`` and every ``read`` first probe the peer's engine, without the GIL;
- control calls go through a small relay process, which resets them after at most 10 s (:mod:`.relay`);
- the data plane gives up by itself on an item that does not arrive within 10 s. Nothing shortens that wait, so a peer
  that stalls in the middle of a read costs up to 10 s with the GIL held, whatever ``timeout_s`` is.

``in_flight``. The receives of a batch are posted to the device before the seed is asked to send. If a read fails after
that, some may still be filled. The engine cancels them on a thread of its own, and its destructor waits for that
thread: ``close`` destroys the engine and so releases the buffers. But if the read failed because bytes did *not*
arrive, that wait may never end, and it would hold the GIL. Then ``close`` keeps the native object and the buffers until
the process ends, and reports it.

After a refused read the wheels make a new connection, and the seed's engine replaces its own in the background. A read
that follows at once may be answered on the old one, and fails after the 10 s (seen once in some hundred reads on a busy
machine). A fork does not read again from a seed that refused.

``EngineConfig.device`` counts the process's visible devices (``ASCEND_RT_VISIBLE_DEVICES``); ``cpu`` is for the tests'
host stand-in. ``EngineConfig.options``: ``receive_wait_s``, the engine's own wait for an item, which only the stand-in
changes. The engine's port has neither TLS nor authentication: a caller with an address can read weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm_rfork.engines.base import EngineConfig, Limits, TransferEngine
from vllm_rfork.engines.host import local_ipv4
from vllm_rfork.engines.one_caller import OneCaller
from vllm_rfork.engines.refusals import not_connected
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
from vllm_rfork.engines.yuanrong.peer import Relay, free_port, parse_endpoint, probe
from vllm_rfork.engines.yuanrong.routes import check_bases, route_of
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
    """A connected peer: its address, the address that the engine uses instead, and the bound of a control call."""

    address: tuple[str, int]
    target: str
    relay: Relay | None
    bound_s: float


class YuanRongEngine(TransferEngine):
    """See the module's docstring."""

    name: ClassVar[str] = NAME
    device_types: ClassVar[frozenset[str]] = frozenset({"npu", "cpu"})
    # HIXL accepts 4096 items a call. Calls above 128 MiB are not faster, smaller ones lose time to their round trips.
    limits: ClassVar[Limits] = Limits(
        max_batch_nbytes=128 * 1024**2, max_batch_items=4096, largest_batch_nbytes=1024**3
    )

    def __init__(self) -> None:
        self._native: NativeEngine | None = None
        self._binding: Binding | None = None
        self._acl: AclRuntime | None = None
        self._table = RegionTable(NAME)
        self._calls = OneCaller(NAME)
        self._peers: dict[str, _Peer] = {}
        self._device = 0
        self._own = ""
        self._route = ""
        self._receive_wait_s = _RECEIVE_WAIT_S
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
            EngineError: the engine does not support the device or the host.
        """
        with self._turn("open"):
            if self._native is not None:
                raise EngineError(NAME, "open", "it is open already")
            device = device_number(config.device)
            self._binding = load_binding()
            self._acl = AclRuntime()
            if config.device.partition(":")[0] == "cpu" and self._acl.has_device_memory:
                raise EngineError(
                    NAME, "open", "on a machine with an Ascend runtime this engine copies NPU memory, not host memory"
                )
            address = local_ipv4(NAME, config.host)
            native, port = _initialized(self._binding, address, device)
            with _ended_on_error(native):
                self._route = route_of(native) if self._binding.chooses_port else ""
            self._native = native
            self._device, self._own = device, f"{address}:{port}"
            self._receive_wait_s = float(config.options.get("receive_wait_s", _RECEIVE_WAIT_S))
            self._calls.opened(config.timeout_s)
            self._overdue = False

    @property
    def endpoint(self) -> str:
        """``host:port``, without memory, which legacy receivers understand."""
        if self._native is None:
            raise EngineError(NAME, "register", "it is not open")
        return self._own

    def register(self, regions: Sequence[Region]) -> None:
        """Register all regions in one native call; the engine rolls back the whole call if it fails.

        With HIXL a registration disconnects every peer (register before publishing), and on its ``auto`` and ``hccs``
        routes a region must begin at a multiple of 2 MiB.
        """
        with self._exclusively("register") as native:
            self._table.check_new(regions)
            check_bases(self._route, regions)
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
        """Probe the peer's engine and, for the generations that need it, start the relay."""
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
        """Read the batch in one native call. ``timeout_s`` bounds the probe; see the module's docstring.

        The engine asks the seed item by item, so a read that the seed refuses may have written earlier items; only a
        refused read of a single item has written nothing.
        """
        deadline = time.monotonic() + timeout_s
        with self._exclusively("read", timeout_s) as native:
            peer = self._peers.get(endpoint)
            if peer is None:
                raise not_connected(NAME, "read")
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
                # The seed is still connecting or, with HIXL, registering.
                last = attempt == _NOT_READY_ATTEMPTS - 1 or time.monotonic() + _NOT_READY_PAUSE_S > deadline
                if code_name(result) != "kNotReady" or last:
                    raise self._read_failure(result, peer, len(segments), elapsed_s)
                time.sleep(_NOT_READY_PAUSE_S)

    def disconnect(self, endpoint: str) -> None:
        """End the relay to the peer; the engine keeps its connection until it is closed."""
        with self._turn("connect"):
            self._forget(endpoint)

    @property
    def registered_nbytes(self) -> int:
        """Bytes registered now."""
        return self._table.nbytes

    def close(self) -> None:
        """Finalize and destroy the native engine; ``open`` creates another."""
        with self._turn("close"):
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
                    NAME, "close", f"bytes of an abandoned read may still arrive ({self._calls.stuck})", in_flight=True
                )
            native.destroy()
            if result.is_error():
                raise failure("close", result)

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusively(self, operation: str, timeout_s: float = 0.0) -> Iterator[NativeEngine]:
        """The native engine, for one caller at a time."""
        with self._turn(operation, timeout_s):
            yield self._calls.usable(operation, self._native)

    def _turn(self, operation: str, timeout_s: float = 0.0) -> AbstractContextManager[None]:
        return self._calls.turn(operation, timeout_s, in_flight=operation == "close", retry_elsewhere=False)

    @property
    def _converses(self) -> bool:
        """Return True if the adapter must bound control calls, because the engine does not."""
        return self._binding is None or not self._binding.bounds_control_calls

    def _patiently(self, native: NativeEngine, operation: str, method: str, *arguments: Any) -> Any:
        """Repeat ``method`` while it returns kNotReady, as HIXL does during a peer's read, up to the timeout."""
        deadline = time.monotonic() + self._calls.timeout_s
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
            self._calls.stuck = error.text
            # Nine tenths, because the engine uses another clock.
            self._overdue = elapsed_s >= 0.9 * min(self._receive_wait_s, peer.bound_s)
        return error


def device_number(device: str, environment: dict[str, str] | None = None) -> int:
    """The engine's number for a torch device: its index among the devices that the process sees.

    Raises:
        EngineError: it is neither an NPU nor the stand-in's ``cpu``, or there is no device of that number.
    """
    kind, _, index = device.partition(":")
    if kind not in YuanRongEngine.device_types or (index and not index.isdigit()):
        raise EngineError(NAME, "open", f"this engine cannot read the memory of {device}")
    number = int(index or 0) if kind == "npu" else 0
    visible = (os.environ if environment is None else environment).get("ASCEND_RT_VISIBLE_DEVICES", "")
    listed = [entry.strip() for entry in visible.split(",")]
    if kind == "npu" and visible and all(entry.isdigit() for entry in listed) and number >= len(listed):
        raise EngineError(
            NAME, "open", f"there is no {device}: ASCEND_RT_VISIBLE_DEVICES={visible} lists {len(listed)} devices"
        )
    return number


def _initialized(binding: Binding, address: str, device: int) -> tuple[NativeEngine, int]:
    """A native engine that listens on ``address``, and its port.

    Another process may take the free port before the engine binds it; then another one is tried. The newest generation
    binds a port of its own choice instead.
    """
    last: EngineError | None = None
    for attempt in range(_PORT_ATTEMPTS):
        own_choice = binding.chooses_port and attempt == 0
        port = 0 if own_choice else free_port(address)
        native = NativeEngine(binding)
        result = native.call("open", "initialize", f"{address}:{port}", _PROTOCOL, f"npu:{device}")
        if not result.is_error():
            with _ended_on_error(native):
                return native, _bound_port(native) if own_choice else port
        last = failure("open", result)
        if "bind" not in last.text and "port" not in last.text:
            break
    assert last is not None  # noqa: S101 - there was at least one attempt
    raise last


@contextmanager
def _ended_on_error(native: NativeEngine) -> Iterator[None]:
    """End an engine, which listens already, if the block fails."""
    try:
        yield
    except EngineError:
        with suppress(EngineError):
            native.call("open", "finalize")
        native.destroy()
        raise


def _bound_port(native: NativeEngine) -> int:
    port = native.call("open", "get_rpc_port")
    if not isinstance(port, int) or not 0 < port < 65536:
        raise EngineError(NAME, "open", f"the engine reports port {port!r}", side="receiver")
    return port
