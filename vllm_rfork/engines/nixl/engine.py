"""NIXL over UCX: the default engine for CUDA and for host memory.

Its lanes:

- one machine, one user and one pid namespace: cross-memory attach for host memory, CUDA IPC for CUDA memory;
- otherwise, between machines or containers: RDMA, if both processes can use an RDMA device;
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
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from vllm_rfork.engines.base import EngineConfig, Limits, Place, TransferEngine
from vllm_rfork.engines.nixl.agent import LOST, Agent, Bound, preload
from vllm_rfork.engines.nixl.pace import Pace
from vllm_rfork.engines.nixl.peer import (
    IDENTITY_NBYTES,
    MEMORY,
    NAME,
    Endpoint,
    Lane,
    decode_endpoint,
    decode_facts,
    encode_endpoint,
    only_tcp,
    permitted_lane,
    tcp_allowed,
    this_process,
)
from vllm_rfork.engines.nixl.reader import THREADS, Reader
from vllm_rfork.engines.one_caller import OneCaller
from vllm_rfork.engines.refusals import not_connected
from vllm_rfork.engines.registrations import RegionTable
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

_SLOTS = 64  # an abandoned probe may still arrive; the next one uses another slot
#: The facts in which a peer at another place differs from this process.
_DIFFERENCES: dict[Place, dict[str, Any]] = {
    "container": {},
    "host": {"pid_namespace": 1},
    "elsewhere": {"boot": "another host"},
}
#: Cross-memory attach copies in one native call, which no deadline interrupts: 256 MiB take 0.05 to 0.25 s. Over TCP
#: the same bytes take up to a second, in which no lease is checked.
_LIMITS = Limits(max_batch_nbytes=256 * 1024**2, max_batch_items=4096, largest_batch_nbytes=1024**3)
#: Other lanes wait in short pauses, and lose 15 % of NVLink's speed between batches of 256 MiB. Digests of one batch
#: are taken during the next, so a batch is a fraction of a model.
_LIMITS_OF_LANES = {
    lane: Limits(max_batch_nbytes=2 * 1024**3, max_batch_items=4096, largest_batch_nbytes=64 * 1024**3)
    for lane in (Lane.CUDA, Lane.RDMA)
}


@dataclass(frozen=True)
class _Peer:
    """A connected peer: its name in the agent, its endpoint, the lane to it, and the pace of its reads."""

    name: str
    endpoint: Endpoint
    lane: Lane
    pace: Pace = field(default_factory=Pace)


class NixlEngine(TransferEngine):
    """See the module's docstring."""

    name: ClassVar[str] = NAME
    device_types: ClassVar[frozenset[str]] = frozenset(MEMORY)
    limits: ClassVar[Limits] = _LIMITS

    def __init__(self) -> None:
        self._agent: Agent | None = None
        self._table = RegionTable(NAME)
        self._calls = OneCaller(NAME)
        self._peers: dict[str, _Peer] = {}
        self._own: Endpoint | None = None
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
    def preload(cls) -> None:
        """Load the libraries: 0.7 of 0.8 s of the first ``open`` on a machine without GPUs."""
        preload()

    @classmethod
    def lane_to(cls, place: Place, device_type: str) -> str:
        """The decision of ``connect`` about an endpoint of this process with the facts of another place."""
        page = ctypes.create_string_buffer(uuid.uuid4().bytes, IDENTITY_NBYTES)
        own = msgspec.structs.replace(
            this_process(device_type, allow_tcp=tcp_allowed({})),
            identity=page.raw,
            identity_at=ctypes.addressof(page),
            gpu="",  # a peer's is another one
        )
        return f"{NAME}/{permitted_lane(own, msgspec.structs.replace(own, **_DIFFERENCES[place])).short}"

    def open(self, config: EngineConfig) -> None:
        """Create an agent: about half a second, without the GIL."""
        allow_tcp = tcp_allowed(config.options)
        own = this_process(config.device, allow_tcp=allow_tcp)
        with self._calls.turn("open"):
            if self._agent is not None:
                raise EngineError(NAME, "open", "it is open already")
            self._agent = Agent(f"rfork-{uuid.uuid4().hex}", own.memory, emulation=allow_tcp, workers=THREADS)
            self._reader = Reader(self._agent, own.device)
            identity = uuid.uuid4().bytes
            ctypes.memmove(self._page, identity, IDENTITY_NBYTES)
            self._calls.opened(config.timeout_s)
            try:
                self._agent.register([(ctypes.addressof(self._page), len(self._page), 0)], "DRAM")
            except EngineError:
                self._agent.destroy()
                self._agent = None
                raise
            self._own = msgspec.structs.replace(own, identity=identity, identity_at=ctypes.addressof(self._page))

    @property
    def endpoint(self) -> str:
        """JSON of :class:`~vllm_rfork.engines.nixl.peer.Endpoint`; about 60 bytes for each registered region."""
        with self._exclusively("register") as agent:
            assert self._own is not None  # noqa: S101 - set with the agent
            return encode_endpoint(msgspec.structs.replace(self._own, metadata=agent.metadata()))

    def register(self, regions: Sequence[Region]) -> None:
        """Register all of ``regions`` in one call."""
        with self._exclusively("register") as agent:
            self._table.check_new(regions)
            if regions:
                assert self._own is not None  # noqa: S101 - set with the agent
                device = self._own.device
                agent.register([(region.address, region.nbytes, device) for region in regions])
                self._table.add(regions)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        """Choose the lane, refuse TCP, and read the peer's identity."""
        deadline = time.monotonic() + timeout_s
        with self._exclusively("connect", timeout_s) as agent:
            peer = decode_endpoint(endpoint)
            assert self._own is not None  # noqa: S101 - set with the agent
            chosen = permitted_lane(self._own, peer)
            if endpoint in self._peers:
                agent.drop_peer(self._peers.pop(endpoint).name, "connect")
            connected = _Peer(agent.add_peer(peer.metadata), peer, chosen)
            try:
                self._check_identity(agent, connected, "connect", deadline)
            except EngineError as error:
                # An abandoned probe arrives in a slot of the engine's own page, not in the caller's memory.
                error.in_flight = False
                self._forget(agent, connected)
                if error.code == LOST and chosen is not Lane.EMULATED and permitted_lane(self._own, peer) is chosen:
                    raise only_tcp("UCX found no other transport (see UCX_TLS and UCX_LOG_LEVEL=info)") from error
                raise
            self._peers[endpoint] = connected

    @classmethod
    def lane_obstacle(cls, endpoint: str, config: EngineConfig) -> str | None:
        """The reason why ``connect`` would refuse; UCX may still find that a lane does not work."""
        seed = decode_facts(endpoint)
        try:
            permitted_lane(this_process(config.device, allow_tcp=tcp_allowed(config.options)), seed)
        except EngineError as error:
            if error.side == "seed":
                raise
            return error.text
        return None

    def limits_for(self, endpoint: str) -> Limits:
        """Larger batches where the waiting thread does not copy."""
        peer = self._peers.get(endpoint)
        return _LIMITS if peer is None else _LIMITS_OF_LANES.get(peer.lane, _LIMITS)

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
            bound = Bound(deadline, lambda: self._calls.closing)
            try:
                attach = peer.lane is Lane.CMA
                self._reader.read(peer.name, peer.endpoint.device, segments, bound, peer.pace, attach=attach)
                self._check_identity(agent, peer, "read", deadline)
            except EngineError as error:
                if error.in_flight:
                    self._calls.stuck = error.text
                if bound.posted:
                    # NIXL marks the peer as disconnected and would refuse another agent of the same name.
                    self._peers.pop(endpoint, None)
                    self._forget(agent, peer)
                raise

    def disconnect(self, endpoint: str) -> None:
        """Forget the peer; does nothing on an engine that is closed or stuck."""
        if self._agent is None or self._calls.stuck or endpoint not in self._peers:
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
        with self._calls.last_turn():
            self._destroy()

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def _exclusively(self, operation: str, timeout_s: float = 0.0) -> Iterator[Agent]:
        """The agent, for one caller at a time."""
        with self._calls.turn(operation, timeout_s):
            yield self._calls.usable(operation, self._agent)

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

    def _check_identity(self, agent: Agent, peer: _Peer, operation: str, deadline: float) -> None:
        """Read the first slot of the peer's page: the same engine is still open."""
        self._probes += 1
        slot = ctypes.addressof(self._page) + IDENTITY_NBYTES * (1 + self._probes % _SLOTS)
        ctypes.memset(slot, 0, IDENTITY_NBYTES)
        own, theirs = [(slot, IDENTITY_NBYTES, 0)], [(peer.endpoint.identity_at, IDENTITY_NBYTES, 0)]
        request = agent.prepare(peer.name, own, theirs, operation=operation, memory="DRAM")
        agent.complete(request, Bound(deadline, lambda: self._calls.closing), operation=operation, quiet_on_error=True)
        if ctypes.string_at(slot, IDENTITY_NBYTES) != peer.endpoint.identity:
            raise EngineError(NAME, operation, "the seed has closed", retry_elsewhere=True, side="seed")

    def _forget(self, agent: Agent, peer: _Peer) -> None:
        """Drop a peer after an error; a second error adds nothing."""
        with suppress(EngineError):
            agent.drop_peer(peer.name, "connect")
