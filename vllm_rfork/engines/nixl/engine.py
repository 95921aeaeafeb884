"""NIXL over UCX: the default engine for CUDA and for host memory.

Its lanes:

- host memory on one machine: cross-memory attach, which needs the same user and the same pid namespace;
- CUDA memory on one machine: CUDA IPC;
- between machines: RDMA;
- otherwise TCP, over which a receiver that dies in the middle of a read, or abandons one, can crash its seed.
  ``connect`` refuses TCP and names the reason why no better lane exists, unless ``RFORK_NIXL_ALLOW_TCP=1`` is set for
  both processes. UCX gets the same setting (``PROTO_EMULATION_ENABLE=n``), so it cannot fall back by itself. TCP is
  still used to set connections up.

Bytes of an abandoned read may still arrive: releasing its request does not stop them, destroying the agent does. So
after such a read the engine refuses every call but ``close``, which destroys the agent.

UCX listens on a TCP port of each network interface and authenticates nobody: a caller with an endpoint can connect.
``UCX_NET_DEVICES`` limits the interfaces.

Settings: ``RFORK_NIXL_ALLOW_TCP`` (``EngineConfig.options`` or the environment), and UCX's own variables.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from vllm_rfork.engines.base import EngineConfig, Limits, Place, TransferEngine
from vllm_rfork.engines.nixl.agent import LOST, Agent, Bound, Descriptor
from vllm_rfork.engines.nixl.peer import (
    ALLOW_TCP,
    IDENTITY_NBYTES,
    NAME,
    Endpoint,
    Lane,
    boot_id,
    decode_endpoint,
    encode_endpoint,
    has_rdma,
    lane,
    pid_namespace,
    tcp_allowed,
)
from vllm_rfork.engines.nixl.reader import THREADS, Reader
from vllm_rfork.engines.refusals import busy, given_up, not_connected, not_open, still_called
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

_SLOTS = 64  # an abandoned probe may still arrive; the next one uses another slot
_MEMORY = {"cpu": "DRAM", "cuda": "VRAM"}
#: The facts in which a peer at another place differs from this process.
_DIFFERENCES: dict[Place, dict[str, Any]] = {
    "container": {},
    "host": {"pid_namespace": 1},
    "elsewhere": {"boot": "another host"},
}


@dataclass(frozen=True)
class _Peer:
    """A connected peer: its name in the agent, its endpoint, and the lane to it."""

    name: str
    endpoint: Endpoint
    lane: Lane


class NixlEngine(TransferEngine):
    """See the module's docstring."""

    name: ClassVar[str] = NAME
    device_types: ClassVar[frozenset[str]] = frozenset(_MEMORY)
    # Cross-memory attach copies in one native call, which no deadline interrupts: 256 MiB take 0.05 to 0.25 s.
    limits: ClassVar[Limits] = Limits(max_batch_nbytes=256 * 1024 * 1024, max_batch_items=4096)

    def __init__(self) -> None:
        self._agent: Agent | None = None
        self._table = RegionTable(NAME)
        self._busy = threading.Lock()
        self._closing = False
        self._stuck = ""
        self._peers: dict[str, _Peer] = {}
        self._own: Endpoint | None = None
        self._device = 0
        self._memory = "DRAM"
        self._timeout_s = 30.0
        # Peers compare the first slot; the others receive what is read from the peers' first slots.
        self._page = ctypes.create_string_buffer(IDENTITY_NBYTES * (_SLOTS + 1))
        self._probes = 0

    # -- the port ------------------------------------------------------------------------------------------------

    @classmethod
    def self_check(cls) -> str:
        """Open an agent."""
        Agent("rfork-doctor", "DRAM", emulation=False).destroy()
        return "an agent opens, with UCX"

    @classmethod
    def lane_to(cls, place: Place, device_type: str) -> str:
        """The decision of ``connect`` about an endpoint of this process with the facts of another place."""
        page = ctypes.create_string_buffer(uuid.uuid4().bytes, IDENTITY_NBYTES)
        own = _endpoint(_MEMORY[device_type], 0, page, allow_tcp=tcp_allowed({}))
        return f"{NAME}/{_lane(own, msgspec.structs.replace(own, **_DIFFERENCES[place])).short}"

    def open(self, config: EngineConfig) -> None:
        """Create an agent: about half a second, without the GIL."""
        kind, _, index = config.device.partition(":")
        if kind not in _MEMORY:
            raise EngineError(NAME, "open", f"this engine cannot read the memory of {config.device}")
        with self._exclusively("open", needs_agent=False):
            if self._agent is not None:
                raise EngineError(NAME, "open", "it is open already")
            allow_tcp = tcp_allowed(dict(config.options))
            self._memory, self._device = _MEMORY[kind], int(index or 0)
            self._timeout_s = config.timeout_s
            self._agent = Agent(f"rfork-{uuid.uuid4().hex}", self._memory, emulation=allow_tcp, workers=THREADS)
            self._reader = Reader(self._agent, self._device)
            identity = uuid.uuid4().bytes
            ctypes.memmove(self._page, identity, IDENTITY_NBYTES)
            self._closing, self._stuck = False, ""
            try:
                self._agent.register([(ctypes.addressof(self._page), len(self._page), 0)], "DRAM")
            except EngineError:
                self._agent.destroy()
                self._agent = None
                raise
            self._own = _endpoint(self._memory, self._device, self._page, allow_tcp=allow_tcp)

    @property
    def endpoint(self) -> str:
        """JSON of :class:`~vllm_rfork.engines.nixl.peer.Endpoint`; about 60 bytes for each registered region."""
        with self._exclusively("register") as agent:
            own = self._own
            if own is None:
                raise EngineError(NAME, "register", "it is not open")
            facts = {name: getattr(own, name) for name in own.__struct_fields__}
            return encode_endpoint(Endpoint(**{**facts, "metadata": agent.metadata()}))

    def register(self, regions: Sequence[Region]) -> None:
        """Register all of ``regions`` in one call."""
        with self._exclusively("register") as agent:
            self._table.check_new(regions)
            if regions:
                agent.register(self._descriptors(regions))
                self._table.add(regions)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Choose the lane, refuse TCP, and read the peer's identity."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("connect", timeout_s) as agent:
            peer = decode_endpoint(endpoint)
            chosen = self._lane(peer)
            if endpoint in self._peers:
                agent.drop_peer(self._peers.pop(endpoint).name, "connect")
            connected = _Peer(agent.add_peer(peer.metadata), peer, chosen)
            try:
                self._check_identity(agent, connected, "connect", deadline)
            except EngineError as error:
                # An abandoned probe arrives in a slot of the engine's own page, not in the caller's memory.
                error.in_flight = False
                self._forget(agent, connected)
                if error.code == LOST and chosen is not Lane.EMULATED and self._lane(peer) is chosen:
                    raise _refused("UCX found no other transport (see UCX_TLS and UCX_LOG_LEVEL=info)") from error
                raise
            self._peers[endpoint] = connected

    def lane(self, endpoint: str) -> str:
        """``nixl/cma``, ``nixl/cuda_ipc``, ``nixl/rdma`` or ``nixl/tcp``."""
        peer = self._peers.get(endpoint)
        return NAME if peer is None else f"{NAME}/{peer.lane.short}"

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        """Read the batch, then compare the seed's identity: it must still be open when the last byte has arrived."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("read", timeout_s) as agent:
            peer = self._peers.get(endpoint)
            if peer is None:
                raise not_connected(NAME, "read")
            self._table.check_local(segments)
            if not segments:
                return
            bound = Bound(deadline, self._is_closing)
            try:
                attach = peer.lane is Lane.CMA
                self._reader.read(peer.name, peer.endpoint.device, segments, bound, attach=attach)
                self._check_identity(agent, peer, "read", deadline)
            except EngineError as error:
                if error.in_flight:
                    self._stuck = error.text
                if bound.posted:
                    # NIXL marks the peer as disconnected and would refuse another agent of the same name.
                    self._peers.pop(endpoint, None)
                    self._forget(agent, peer)
                raise

    def disconnect(self, endpoint: str) -> None:
        """Forget the peer; does nothing on an engine that is closed or stuck."""
        if self._agent is None or self._stuck or endpoint not in self._peers:
            return
        with self._exclusively("connect") as agent:
            agent.drop_peer(self._peers.pop(endpoint).name, "connect")

    @property
    def registered_nbytes(self) -> int:
        """Bytes registered now, without the engine's own page."""
        return self._table.nbytes

    def close(self) -> None:
        """Destroy the agent. A read in another thread is given up first and raises there."""
        if self._agent is None:
            return
        self._closing = True
        if not self._busy.acquire(timeout=self._timeout_s):
            raise still_called(NAME)
        try:
            self._destroy()
        finally:
            self._busy.release()

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusively(self, operation: str, timeout_s: float = 0.0, *, needs_agent: bool = True) -> Iterator[Agent]:
        """The agent, for one caller at a time."""
        if not self._busy.acquire(timeout=timeout_s or self._timeout_s):
            raise busy(NAME, operation, retry_elsewhere=True)
        try:
            if needs_agent and (self._agent is None or self._closing):
                raise not_open(NAME, operation)
            if needs_agent and self._stuck:
                raise given_up(NAME, operation, self._stuck)
            yield self._agent  # type: ignore[misc]
        finally:
            self._busy.release()

    def _destroy(self) -> None:
        """End the agent and its registrations."""
        agent, self._agent = self._agent, None
        if agent is None:  # another thread closed first
            return
        # A peer that still has this engine's endpoint must not read later memory as weights.
        ctypes.memset(self._page, 0, IDENTITY_NBYTES)
        self._own = None
        self._peers = {}
        self._table.clear()
        self._reader.close()
        if not agent.destroy():
            raise EngineError(NAME, "close", "the agent is still referenced", in_flight=True)

    def _is_closing(self) -> bool:
        return self._closing

    def _descriptors(self, regions: Sequence[Region]) -> list[Descriptor]:
        return [(region.address, region.nbytes, self._device) for region in regions]

    def _lane(self, peer: Endpoint) -> Lane:
        assert self._own is not None  # noqa: S101 - set with the agent
        return _lane(self._own, peer)

    def _check_identity(self, agent: Agent, peer: _Peer, operation: str, deadline: float) -> None:
        """Read the first slot of the peer's page: the same engine is still open."""
        self._probes += 1
        slot = ctypes.addressof(self._page) + IDENTITY_NBYTES * (1 + self._probes % _SLOTS)
        ctypes.memset(slot, 0, IDENTITY_NBYTES)
        own, theirs = [(slot, IDENTITY_NBYTES, 0)], [(peer.endpoint.identity_at, IDENTITY_NBYTES, 0)]
        request = agent.prepare(peer.name, own, theirs, operation=operation, memory="DRAM")
        agent.complete(request, Bound(deadline, self._is_closing), operation=operation, quiet_on_error=True)
        if ctypes.string_at(slot, IDENTITY_NBYTES) != peer.endpoint.identity:
            raise EngineError(NAME, operation, "the seed has closed", retry_elsewhere=True, side="seed")

    def _forget(self, agent: Agent, peer: _Peer) -> None:
        """Drop a peer after an error; a second error adds nothing."""
        with suppress(EngineError):
            agent.drop_peer(peer.name, "connect")


def _endpoint(memory: str, device: int, page: ctypes.Array[ctypes.c_char], *, allow_tcp: bool) -> Endpoint:
    """The endpoint of this process, without NIXL's metadata; the identity is at the beginning of ``page``."""
    return Endpoint(
        memory=memory,
        device=device,
        boot=boot_id(),
        pid=os.getpid(),
        uid=os.getuid(),
        pid_namespace=pid_namespace(),
        identity=page.raw[:IDENTITY_NBYTES],
        identity_at=ctypes.addressof(page),
        rdma=has_rdma(),
        allow_tcp=allow_tcp,
        metadata=b"",
    )


def _lane(own: Endpoint, peer: Endpoint) -> Lane:
    """The lane between the two. Raises EngineError if it would be TCP and one of the two does not permit it."""
    chosen, why = lane(own, peer)
    if chosen is Lane.EMULATED and not (own.allow_tcp and peer.allow_tcp):
        raise _refused(why)
    return chosen


def _refused(why: str) -> EngineError:
    return EngineError(
        NAME,
        "connect",
        f"only TCP is left to reach this seed, since {why}; over TCP a receiver that dies in the middle of a read can "
        f"crash its seed. Set {ALLOW_TCP}=1 for seed and receiver to take it all the same",
        code="lane",
        retry_elsewhere=True,
        side="receiver",
    )
