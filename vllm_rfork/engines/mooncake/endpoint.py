"""A Mooncake endpoint: the session, the protocol, the kind of memory, the identity and the registered regions."""

from __future__ import annotations

import hashlib
import ipaddress
import os

import msgspec

from vllm_rfork.engines import host
from vllm_rfork.engines.mooncake.wheels import with_efa
from vllm_rfork.engines.rdma import rdma_obstacle
from vllm_rfork.errors import EngineError

NAME = "mooncake"
#: Mooncake's own variable: whatever it contains, the engine uses TCP.
FORCE_TCP = "MC_FORCE_TCP"
IDENTITY_NBYTES = 16
#: 100,000 regions take 3 MB.
MAX_ENDPOINT_LENGTH = 16 * 1024 * 1024
PROTOCOLS = ("tcp", "rdma", "efa", "ascend")
_VERSION = 1
_MAX_ADDRESS = 1 << 63
_MAX_BOOT_LENGTH = 64


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one engine for its peers.

    Attributes:
        session: ``address:port`` of its handshakes, with an IPv4 address.
        protocol: one of :data:`PROTOCOLS`; both sides need the same.
        memory: the torch device type of the registered memory.
        boot: identifies the host's running kernel; empty if it cannot be read.
        identity: the bytes at address ``identity_at`` while the engine is open.
        regions: registered address and length in bytes, by address, disjoint.
        checksum: over all of these.
    """

    v: int = _VERSION
    session: str
    protocol: str
    memory: str
    boot: str
    identity: bytes
    identity_at: int
    regions: list[tuple[int, int]]
    checksum: str = ""


def encode(endpoint: Endpoint) -> str:
    """JSON text, with the checksum."""
    return msgspec.json.encode(msgspec.structs.replace(endpoint, checksum=_checksum(endpoint))).decode()


def decode(text: str) -> Endpoint:
    """The inverse.

    Raises:
        EngineError: not an endpoint of this engine, of another version, damaged, or its parts are impossible.
    """
    if len(text) > MAX_ENDPOINT_LENGTH:
        raise _unusable(f"an endpoint of {len(text)} characters is too long")
    try:
        endpoint = msgspec.json.decode(text.encode(), type=Endpoint)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise _unusable(f"{text[:80]!r} is not an endpoint of this engine: {error}") from error
    if endpoint.v != _VERSION:
        raise _unusable(f"the seed's endpoint has version {endpoint.v}, and this process reads {_VERSION}")
    if endpoint.checksum != _checksum(endpoint):
        raise _unusable("the seed's endpoint was damaged: its checksum differs")
    if (problem := _contradiction(endpoint)) is not None:
        raise _unusable(f"the seed's endpoint is unusable: {problem}")
    return endpoint


def _unusable(text: str) -> EngineError:
    return EngineError(NAME, "connect", text, retry_elsewhere=True, side="seed")


def _checksum(endpoint: Endpoint) -> str:
    """The checksum of the fields in their order, without itself."""
    digest = hashlib.blake2b(digest_size=16, person=b"rfork-mooncake-1")
    fields = ("v", "session", "protocol", "memory", "boot", "identity", "identity_at", "regions")
    digest.update(msgspec.json.encode([getattr(endpoint, name) for name in fields]))
    return digest.hexdigest()


def _contradiction(endpoint: Endpoint) -> str | None:
    """The first impossible part, if there is one."""
    if session_address(endpoint.session) is None:
        return f"{endpoint.session[:80]!r} is not address:port"
    if endpoint.protocol not in PROTOCOLS:
        return f"protocol {endpoint.protocol[:20]!r}"
    if len(endpoint.boot) > _MAX_BOOT_LENGTH:
        return "an identifier of its host that is too long"
    if len(endpoint.identity) != IDENTITY_NBYTES or not 0 < endpoint.identity_at < _MAX_ADDRESS:
        return "an identity of the wrong length or nowhere"
    end = 0
    for address, nbytes in endpoint.regions:
        if not 0 < address < _MAX_ADDRESS or not 0 < nbytes < _MAX_ADDRESS or address < end:
            return f"{nbytes} bytes at {address:#x} are empty, overlap, or are out of order"
        end = address + nbytes
    return None


def session_address(session: str) -> ipaddress.IPv4Address | None:
    """The address in ``address:port``; None if it is not an IPv4 address of one host with a port."""
    address, _, port = session.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16):
        return None
    try:
        parsed = ipaddress.IPv4Address(address)
    except ValueError:
        return None
    return None if parsed.is_multicast or parsed.is_unspecified else parsed


def own_protocol(device_type: str) -> str:
    """The protocol of this process: the device's own, RDMA if a device can be used, else TCP."""
    if device_type == "npu":
        return "ascend"
    if tcp_reason() is not None:
        return "tcp"
    return "efa" if with_efa() else "rdma"


def tcp_reason() -> str | None:
    """The reason why this process uses TCP with host memory and GPUs; None if it uses RDMA."""
    return f"{FORCE_TCP} is set" if FORCE_TCP in os.environ else rdma_obstacle()


def obstacle(endpoint: Endpoint, device_type: str) -> str | None:
    """The reason why no lane leads from ``endpoint`` to this process, with the remedy; None if one may."""
    if endpoint.memory != device_type:
        return f"the seed has {endpoint.memory[:20]} memory, this process {device_type}"
    own = own_protocol(device_type)
    if endpoint.protocol != own:
        why = f" ({tcp_reason()})" if own == "tcp" else ""
        return (
            f"the seed uses {endpoint.protocol} and this process {own}{why}: give both RDMA, or set {FORCE_TCP}=1 "
            "for both"
        )
    address = session_address(endpoint.session)
    if address is not None and address.is_loopback and endpoint.boot != host.boot_id_if_known():
        return (
            f"the seed is on another host and its address {endpoint.session} is a loopback address: set "
            "rfork_seed_advertise_host for the seed"
        )
    return None
