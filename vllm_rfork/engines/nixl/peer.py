"""The endpoint of a NIXL process, and the lane from one process to another.

UCX chooses its transport silently. Over an emulated one (TCP, or shared memory without cross-memory attach) a receiver
that dies in the middle of a read can crash the seed's process. So the endpoint contains the facts that decide the lane,
and :func:`lane` decides it before UCX does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path

import msgspec

from vllm_rfork.engines import host
from vllm_rfork.engines.nixl.metadata import MAX_DEVICES, check_metadata
from vllm_rfork.engines.process_memory import read_process
from vllm_rfork.engines.rdma import rdma_obstacle
from vllm_rfork.errors import EngineError

NAME = "nixl"
ALLOW_TCP = "RFORK_NIXL_ALLOW_TCP"
IDENTITY_NBYTES = 16
#: NIXL's kinds of memory, by torch device type.
MEMORY = {"cpu": "DRAM", "cuda": "VRAM"}
MAX_ENDPOINT_LENGTH = 48 * 1024 * 1024
_VERSION = 1


class Lane(Enum):
    """The paths of the bytes. The first two need one machine, one user and one pid namespace."""

    CMA = "cross-memory attach"
    CUDA = "CUDA IPC"
    RDMA = "RDMA"
    EMULATED = "TCP"

    @property
    def short(self) -> str:
        """The lane's name in records: one word."""
        return {"cross-memory attach": "cma", "CUDA IPC": "cuda_ipc"}.get(self.value, self.value.lower())


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one NIXL agent for its peers.

    Attributes:
        memory: NIXL's kind of memory (``DRAM``, ``VRAM``); ``device`` is the device number.
        boot: identifies the machine's running kernel.
        identity: the bytes at address ``identity_at`` while the engine is open.
        rdma, allow_tcp: the process can use an RDMA device; its user permits TCP.
        metadata: NIXL's own.
        checksum: over all of these; empty from older seeds.
        gpu: the GPU's UUID in hexadecimal digits; empty if it is unknown, and from older seeds.
    """

    v: int = _VERSION
    memory: str
    device: int
    boot: str
    pid: int
    uid: int
    pid_namespace: int
    identity: bytes
    identity_at: int
    rdma: bool
    allow_tcp: bool
    metadata: bytes
    checksum: str = ""
    gpu: str = ""


def encode_endpoint(endpoint: Endpoint) -> str:
    """JSON text, with the checksum."""
    return msgspec.json.encode(msgspec.structs.replace(endpoint, checksum=_checksum(endpoint))).decode()


def _checksum(endpoint: Endpoint) -> str:
    """The checksum of these fields in this order, independent of fields that later versions add."""
    digest = hashlib.blake2b(endpoint.metadata, digest_size=16, person=b"rfork-endpoint-1")
    fields = ("memory", "device", "boot", "pid", "uid", "pid_namespace", "identity", "identity_at", "rdma", "allow_tcp")
    digest.update(msgspec.json.encode([getattr(endpoint, name) for name in fields]))
    return digest.hexdigest()


def decode_endpoint(text: str) -> Endpoint:
    """The inverse. NIXL can load the result's metadata.

    Raises:
        EngineError: not an endpoint of this engine, of another version, or damaged.
    """
    endpoint = decode_facts(text)
    try:
        check_metadata(endpoint.metadata, endpoint.identity_at, IDENTITY_NBYTES)
    except ValueError as error:
        text = f"the metadata in the seed's endpoint is not NIXL's: {error}"
        raise EngineError(NAME, "connect", text, retry_elsewhere=True, side="seed") from error
    return endpoint


def decode_facts(text: str) -> Endpoint:
    """The endpoint with unchecked metadata, which NIXL must not load.

    Raises:
        EngineError: as :func:`decode_endpoint`.
    """
    if len(text) > MAX_ENDPOINT_LENGTH:
        raise _unreadable(f"an endpoint of {len(text)} characters is too long")
    try:
        endpoint = msgspec.json.decode(text.encode(), type=Endpoint)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        text = f"{text[:80]!r} is not an endpoint of this engine: {error}"
        raise _unreadable(text) from error
    possible = (
        0 < endpoint.pid < 1 << 31
        and 0 <= endpoint.uid < 1 << 32
        and 0 <= endpoint.pid_namespace < 1 << 64
        and 0 < endpoint.identity_at < 1 << 63
        and len(endpoint.identity) == IDENTITY_NBYTES
        and 0 <= endpoint.device < MAX_DEVICES
    )
    if endpoint.v != _VERSION or not possible:
        raise _unreadable(f"{text[:80]!r} is not an endpoint that this version reads")
    if endpoint.checksum and endpoint.checksum != _checksum(endpoint):
        raise _unreadable("the seed's endpoint was damaged: its checksum differs")
    return endpoint


def _unreadable(text: str) -> EngineError:
    """The failure of a seed whose endpoint cannot be used; another seed's may be sound."""
    return EngineError(NAME, "connect", text, retry_elsewhere=True, side="seed")


def this_process(device: str, *, allow_tcp: bool) -> Endpoint:
    """The facts about this process as an endpoint, without an agent: identity and metadata are missing.

    Args:
        device: as in :class:`~vllm_rfork.engines.base.EngineConfig`.

    Raises:
        EngineError: the engine cannot read such a device's memory.
    """
    kind, _, index = device.partition(":")
    if kind not in MEMORY or (index and not index.isdecimal()):
        raise EngineError(NAME, "open", f"this engine cannot read the memory of {device}", side="receiver")
    return Endpoint(
        memory=MEMORY[kind],
        device=int(index or 0),
        boot=host.boot_id_if_known(),
        pid=os.getpid(),
        uid=os.getuid(),
        pid_namespace=pid_namespace(),
        identity=bytes(IDENTITY_NBYTES),
        identity_at=0,
        rdma=rdma_obstacle() is None,
        allow_tcp=allow_tcp,
        metadata=b"",
        gpu=host.gpu_uuid(int(index or 0)) if kind == "cuda" else "",
    )


def pid_namespace() -> int:
    """The inode of this process's pid namespace; 0 if it cannot be read."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def tcp_allowed(options: Mapping[str, str]) -> bool:
    """Return True if the user accepted the risk of TCP, in ``options`` or the environment."""
    return options.get(ALLOW_TCP, os.environ.get(ALLOW_TCP, "")).strip().lower() in {"1", "true", "yes"}


def permitted_lane(own: Endpoint, peer: Endpoint) -> Lane:
    """The lane from ``peer`` to ``own``.

    Raises:
        EngineError: there is none (``code="lane"``), or the peer has closed.
    """
    chosen, why = lane(own, peer)
    if chosen is Lane.EMULATED and not (own.allow_tcp and peer.allow_tcp):
        raise only_tcp(why)
    return chosen


def only_tcp(why: str) -> EngineError:
    """The refusal of the lane that can crash a seed; ``why`` there is no other."""
    return EngineError(
        NAME,
        "connect",
        f"only TCP is left to reach this seed, since {why}; over TCP a receiver that dies in the middle of a read can "
        f"crash its seed. Set {ALLOW_TCP}=1 for seed and receiver to take it all the same",
        code="lane",
        retry_elsewhere=True,
        side="receiver",
    )


def lane(own: Endpoint, peer: Endpoint) -> tuple[Lane, str]:
    """The lane from ``peer`` to ``own``, and for TCP the reason why there is no better one.

    On one machine, processes that cannot attach to each other (two containers, two users) still have RDMA.

    Raises:
        EngineError: the two have different kinds of memory or the same GPU, or the peer has closed.
    """
    if own.memory != peer.memory:
        text = f"the seed holds {peer.memory} memory, this process {own.memory}"
        raise EngineError(NAME, "connect", text, code="lane", side="receiver")
    if own.gpu and own.gpu == peer.gpu:
        # UCX fails in the read: "No zero-copy protocol found for get into cuda from cuda".
        text = "the seed is on the same GPU, where UCX cannot copy between processes; use engine cuda_ipc"
        raise EngineError(NAME, "connect", text, code="lane", retry_elsewhere=True, side="receiver")
    why: str | None = "the seed is on another machine"
    if own.boot == peer.boot and own.boot:
        why = _attach_obstacle(own, peer)
    if why is None:
        return (Lane.CUDA if own.memory == "VRAM" else Lane.CMA), ""
    if own.rdma and peer.rdma:
        return Lane.RDMA, ""
    return Lane.EMULATED, f"{why}, and {'the seed' if own.rdma else 'this process'} has no RDMA device that it can use"


def _attach_obstacle(own: Endpoint, peer: Endpoint) -> str | None:
    """The reason why this process cannot read the peer's memory on the same machine; None if it can."""
    if own.pid_namespace != peer.pid_namespace or not own.pid_namespace:
        return "the seed is in another pid namespace (another container)"
    if own.uid != peer.uid:
        return f"the seed runs as another user (uid {peer.uid}, this process {own.uid})"
    seen = ctypes.create_string_buffer(IDENTITY_NBYTES)
    try:
        read_process(peer.pid, ctypes.addressof(seen), peer.identity_at, IDENTITY_NBYTES)
    except ProcessLookupError as error:
        raise EngineError(
            NAME, "connect", f"the seed's process {peer.pid} is gone", retry_elsewhere=True, side="seed"
        ) from error
    except OSError as error:
        return f"the seed's memory cannot be attached ({error.strerror})"
    if seen.raw != peer.identity:
        raise EngineError(
            NAME, "connect", f"the seed in process {peer.pid} has closed", retry_elsewhere=True, side="seed"
        )
    return None
