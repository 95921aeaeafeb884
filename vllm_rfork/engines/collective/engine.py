"""A two-sided transfer engine: the seed sends what a receiver requests, in a group of two.

It needs no RDMA, no common host and no package but vLLM's own, and works between any two processes that reach each
other over TCP. Its price is that the seed takes part: a thread and processor time on the CPU, small kernels on a GPU.
So it comes last in every order of engines.

A group belongs to one receiver. It is created by ``connect``, destroyed by ``disconnect`` and by every failure, and
independent of ``torch.distributed``'s default group and of vLLM's groups.
"""

from __future__ import annotations

import atexit
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import ClassVar

from vllm_rfork.engines.base import EngineConfig, Limits, Place, TransferEngine
from vllm_rfork.engines.collective.channel import SECRET_NBYTES
from vllm_rfork.engines.collective.endpoint import NAME, Endpoint, decode, encode, obstacle
from vllm_rfork.engines.collective.group import LANES, Backend, GroupFailed, backend_class
from vllm_rfork.engines.collective.messages import MAX_SEGMENTS
from vllm_rfork.engines.collective.receiver import Peer
from vllm_rfork.engines.collective.sender import MAX_BATCH_NBYTES, Sender
from vllm_rfork.engines.host import gpu_uuid
from vllm_rfork.engines.one_caller import OneCaller
from vllm_rfork.engines.refusals import not_connected
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.engines.registry import install_hint
from vllm_rfork.errors import EngineError, EngineUnavailable
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment


class CollectiveEngine(TransferEngine):
    """See the module's docstring. A lock admits one caller at a time."""

    name: ClassVar[str] = NAME
    device_types: ClassVar[frozenset[str]] = frozenset(LANES)
    #: A batch of 128 MiB occupies one of the seed's few sends for some tenths of a second.
    limits: ClassVar[Limits] = Limits(
        max_batch_nbytes=128 * 1024 * 1024, max_batch_items=MAX_SEGMENTS, largest_batch_nbytes=MAX_BATCH_NBYTES
    )
    opens_quickly: ClassVar[bool] = True

    def __init__(self) -> None:
        self._calls = OneCaller(NAME)
        self._lease = ""
        self._backend: Backend | None = None
        self._sender: Sender | None = None
        self._endpoint = ""
        self._gpu = ""
        self._pid = 0
        self._table = RegionTable(NAME)
        self._peers: dict[str, Peer] = {}

    # -- the port ------------------------------------------------------------------------------------------------

    @classmethod
    def self_check(cls) -> str:
        """Load the library of each kind of device; those that this machine lacks are left out."""
        loaded = [LANES["cpu"]]
        for device_type in ("cuda", "npu"):
            with suppress(EngineError):
                backend(device_type).close()
                loaded.append(LANES[device_type])
        return f"{' and '.join(loaded)} can be used"

    @classmethod
    def lane_to(cls, place: Place, device_type: str) -> str:
        """It reaches every place that TCP reaches."""
        return f"{NAME}/{LANES[device_type]}"

    @classmethod
    def lane_obstacle(cls, endpoint: str, config: EngineConfig) -> str | None:
        """The seed's memory is on another kind of device, or on the same GPU."""
        return obstacle(decode(endpoint), LANES[config.device.partition(":")[0]], _gpu(config.device))

    def open(self, config: EngineConfig) -> None:
        """Load the library and listen on ``config.host``: milliseconds if torch is imported already.

        Raises:
            EngineUnavailable: the device's library is missing, or torch, which brings it.
            EngineError: it cannot listen there.
        """
        device_type = config.device.partition(":")[0]
        if device_type not in LANES:
            raise EngineError(NAME, "open", f"this engine cannot read the memory of {config.device}")
        with self._calls.turn("open"):
            if self._sender is not None:
                raise EngineError(NAME, "open", "it is open already")
            library = backend(config.device)
            self._calls.opened(config.timeout_s)
            secret = secrets.token_bytes(SECRET_NBYTES)
            try:
                sender = Sender(library, config.host, secret, self._holds)
            except (OSError, UnicodeError, RuntimeError) as error:  # no address, no host name, no thread
                library.close()
                remedy = "set rfork_seed_advertise_host to an address of this machine"
                text = f"it cannot listen on {config.host}: {error}; {remedy}"
                raise EngineError(NAME, "open", text) from error
            own = Endpoint(
                backend=library.name, host=config.host, port=sender.port, secret=secret, gpu=_gpu(config.device)
            )
            self._backend, self._sender, self._endpoint, self._gpu = library, sender, encode(own), own.gpu
            self._pid = os.getpid()
            atexit.register(self._end)

    @property
    def endpoint(self) -> str:
        """JSON of :class:`~vllm_rfork.engines.collective.endpoint.Endpoint`; contains a secret."""
        with self._exclusively("register"):
            return self._endpoint

    def register(self, regions: Sequence[Region]) -> None:
        """Record ``regions``; costs nothing on the device."""
        with self._exclusively("register"):
            self._table.check_new(regions)
            grown = RegionTable(NAME)
            grown.add([*self._table.regions, *regions])
            self._table = grown  # at once, for the sender's threads

    def present_lease(self, lease: str) -> None:
        """Send ``lease`` with the next ``connect``, for the seed's log."""
        self._lease = lease[:256]

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Prove the secret and create a group with the seed."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("connect", timeout_s) as own:
            known = self._peers.pop(endpoint, None)
            if known is not None:
                known.close()
            peer = decode(endpoint)
            if (text := obstacle(peer, own.name, self._gpu)) is not None:
                raise EngineError(NAME, "connect", text, code="lane", retry_elsewhere=True, side="receiver")
            self._peers[endpoint] = Peer(peer, own, self._lease, deadline)

    def lane(self, endpoint: str) -> str:
        """``collective/tcp``, ``collective/nccl`` or ``collective/hccl``."""
        return NAME if self._backend is None else f"{NAME}/{self._backend.name}"

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Let the seed send the segments; a failure other than a refusal also ends the connection."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("read", timeout_s):
            peer = self._peers.get(endpoint)
            if peer is None:
                raise not_connected(NAME, "read")
            self._table.check_local(segments)
            if not segments:
                return
            try:
                peer.read(segments, deadline)
            except EngineError as error:
                if error.in_flight:
                    self._calls.stuck = error.text
                elif not peer.usable:
                    del self._peers[endpoint]
                raise

    def disconnect(self, endpoint: str) -> None:
        """Destroy the group; does nothing on an engine that is closed or stuck."""
        if self._sender is None or self._calls.stuck or endpoint not in self._peers:
            return
        with self._exclusively("connect"):
            self._peers.pop(endpoint).close()

    @property
    def registered_nbytes(self) -> int:
        """Bytes registered now."""
        return self._table.nbytes

    def close(self) -> None:
        """End every group, those of receivers and those of reads; a read in another thread is given up first.

        Raises:
            EngineError: a group cannot be ended (``in_flight``).
        """
        if self._sender is None:
            return
        self._calls.closing = True  # before the reads that are given up here
        for peer in list(self._peers.values()):
            peer.abort()
        with self._calls.last_turn():
            self._shut()

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusively(self, operation: str, timeout_s: float = 0.0) -> Iterator[Backend]:
        """The backend, for one caller at a time."""
        with self._calls.turn(operation, timeout_s):
            yield self._calls.usable(operation, None if self._sender is None else self._backend)

    def _holds(self, address: int, nbytes: int) -> bool:
        return not self._calls.closing and self._table.holds(address, nbytes)

    def _shut(self) -> None:
        sender = self._sender
        if sender is None:  # another thread closed first
            return
        try:
            sender.stop(self._calls.timeout_s)
        except GroupFailed as error:
            raise EngineError(NAME, "close", str(error), code="timeout", in_flight=True) from error
        for peer in self._peers.values():
            peer.close()
        if self._backend is not None:
            self._backend.close()
        self._peers, self._backend, self._sender, self._endpoint = {}, None, None, ""
        self._table = RegionTable(NAME)
        atexit.unregister(self._end)

    def _end(self) -> None:
        """Close when the process exits: threads in native calls must not outlive Python."""
        if os.getpid() != self._pid:
            return  # a forked child, which shares the listener
        self._calls.timeout_s = min(self._calls.timeout_s, 2.0)
        with suppress(EngineError):  # nothing is left to do
            self.close()


def _gpu(device: str) -> str:
    """The UUID of a CUDA device, in hexadecimal digits; empty for other devices, and if it is unknown."""
    device_type, _, index = device.partition(":")
    return gpu_uuid(int(index or 0)) if device_type == "cuda" else ""


def backend(device: str) -> Backend:
    """The library for a torch device, such as ``cuda:1``.

    Raises:
        EngineUnavailable: it is not installed.
        EngineError: there is no such device.
    """
    device_type, _, index = device.partition(":")
    try:
        return backend_class(device_type)(int(index or 0))
    except (ImportError, OSError) as error:
        text = f"{LANES[device_type]} cannot be loaded: {error}"
        raise EngineUnavailable(NAME, text, hint=install_hint(NAME)) from error
    except GroupFailed as error:
        raise EngineError(NAME, "open", str(error)) from error
