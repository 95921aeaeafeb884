"""A CUDA IPC endpoint: the host, the GPU, the allocations with their handles, and the registered regions."""

from __future__ import annotations

import bisect

import msgspec

from vllm_rfork.engines import host
from vllm_rfork.engines.cuda_ipc.driver import HANDLE_NBYTES, NAME, UUID_NBYTES
from vllm_rfork.errors import EngineError

IDENTITY_NBYTES = 16
MAX_ENDPOINT_LENGTH = 16 * 1024 * 1024
_VERSION = 1
_MAX_ADDRESS = 1 << 63


class Allocation(msgspec.Struct, frozen=True, array_like=True):
    """One allocation of the seed: base address, length in bytes, and its handle for other processes."""

    base: int
    nbytes: int
    handle: bytes


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one engine for its peers.

    Attributes:
        boot: identifies the host's running kernel; containers of one host share it.
        device: the GPU's UUID.
        identity: the random bytes at the beginning of the allocation ``page`` while the engine is open.
        page: that allocation.
        allocations: by base address; every region lies in one of them.
        regions: registered address and length in bytes, by address, disjoint.
    """

    v: int = _VERSION
    boot: str
    device: bytes
    identity: bytes
    page: Allocation
    allocations: list[Allocation]
    regions: list[tuple[int, int]]


def encode(endpoint: Endpoint) -> str:
    """JSON text; 88 characters of handle for each allocation."""
    return msgspec.json.encode(endpoint).decode()


def decode(text: str) -> Endpoint:
    """The inverse.

    Raises:
        EngineError: not an endpoint of this engine, or its parts contradict each other.
    """
    if len(text) > MAX_ENDPOINT_LENGTH:
        raise EngineError(
            NAME, "connect", f"an endpoint of {len(text)} characters is too long", retry_elsewhere=True, side="seed"
        )
    try:
        endpoint = msgspec.json.decode(text.encode(), type=Endpoint)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        problem = f"{text[:80]!r} is not an endpoint of this engine: {error}"
        raise EngineError(NAME, "connect", problem, retry_elsewhere=True, side="seed") from error
    if (contradiction := _contradiction(endpoint)) is not None:
        problem = f"the seed's endpoint is unusable: {contradiction}"
        raise EngineError(NAME, "connect", problem, retry_elsewhere=True, side="seed")
    return endpoint


def _contradiction(endpoint: Endpoint) -> str | None:
    """The first contradiction, if there is one."""
    if endpoint.v != _VERSION:
        return f"version {endpoint.v}"
    if len(endpoint.identity) != IDENTITY_NBYTES or len(endpoint.device) != UUID_NBYTES:
        return "an identity of the wrong length"
    if any(len(each.handle) != HANDLE_NBYTES for each in (endpoint.page, *endpoint.allocations)):
        return "a handle of the wrong length"
    if endpoint.page.nbytes < IDENTITY_NBYTES:
        return "no room for the identity"
    allocations = [(each.base, each.nbytes) for each in endpoint.allocations]
    return _disorder(allocations) or _disorder(endpoint.regions) or _outside(endpoint.regions, allocations)


def _disorder(ranges: list[tuple[int, int]]) -> str | None:
    """The first range that is empty, out of order or overlaps the one before it."""
    end = 0
    for address, nbytes in ranges:
        if not 0 < address < _MAX_ADDRESS or not 0 < nbytes < _MAX_ADDRESS or address < end:
            return f"{nbytes} bytes at {address:#x} are empty, overlap, or are out of order"
        end = address + nbytes
    return None


def _outside(regions: list[tuple[int, int]], allocations: list[tuple[int, int]]) -> str | None:
    """The first region that no allocation contains."""
    known = RangeMap(allocations)
    for address, nbytes in regions:
        if known.containing(address, nbytes) is None:
            return f"the region of {nbytes} bytes at {address:#x} is in no allocation"
    return None


class RangeMap:
    """Disjoint ranges in address order, with a search for the one that contains a span."""

    def __init__(self, ranges: list[tuple[int, int]]) -> None:
        self._ranges = ranges
        self._starts = [address for address, _ in ranges]

    def containing(self, address: int, nbytes: int) -> int | None:
        """The number of the range that contains the whole span; None if no single one does."""
        number = bisect.bisect_right(self._starts, address) - 1
        if number < 0 or nbytes <= 0:
            return None
        start, length = self._ranges[number]
        return number if address + nbytes <= start + length else None


def boot_id() -> str:
    """The identifier of this host's running kernel.

    Raises:
        EngineError: it cannot be read, so seeds on this host cannot be recognized.
    """
    try:
        return host.boot_id()
    except OSError as error:
        raise EngineError(NAME, "open", f"the host cannot be identified: {error}", side="receiver") from error
