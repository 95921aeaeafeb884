"""A connected seed: its allocations mapped into this process, and the copies that a read makes from them."""

from __future__ import annotations

import bisect
from collections.abc import Container, Iterable
from contextlib import suppress

from vllm_rfork.engines.cuda_ipc.driver import NAME, Driver
from vllm_rfork.engines.cuda_ipc.endpoint import Allocation, Endpoint, RangeMap
from vllm_rfork.errors import EngineError
from vllm_rfork.manifest.segments import Segment


class MappedPeer:
    """A seed whose allocations have addresses in this process. Made by :func:`map_peer`.

    Attributes:
        identity: the bytes at ``page`` while the seed's engine is open.
        page: the address of the identity in this process.
    """

    def __init__(self, endpoint: Endpoint, page: int, mapped: list[int]) -> None:
        self.identity = endpoint.identity
        self.page = page
        self._mapped = mapped
        allocations = RangeMap([(each.base, each.nbytes) for each in endpoint.allocations])
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._shifts: list[int] = []
        for address, nbytes in endpoint.regions:
            number = allocations.containing(address, nbytes)
            assert number is not None  # noqa: S101 - checked when the endpoint was decoded
            self._starts.append(address)
            self._ends.append(address + nbytes)
            self._shifts.append(mapped[number] - endpoint.allocations[number].base)

    def copies(self, segments: Iterable[Segment], local_bases: Container[int]) -> list[tuple[int, int, int]]:
        """Destination, source and length of the copies that ``segments`` need, with addresses of this process.

        Segments that continue each other on both sides are one copy, because each copy has a fixed cost.

        Args:
            local_bases: where this process's own allocations begin; a copy may not reach from one into the next.

        Raises:
            EngineError: no single registered region of the seed contains a segment.
        """
        copies: list[tuple[int, int, int]] = []
        starts, ends = self._starts, self._ends
        number = -1
        first = source = nbytes = 0
        for local, remote, length in segments:
            before, number = number, bisect.bisect_right(starts, remote) - 1
            if number < 0 or length <= 0 or remote + length > ends[number]:
                raise _unregistered(remote, length)
            here = remote + self._shifts[number]
            if number == before and local == first + nbytes and here == source + nbytes and local not in local_bases:
                nbytes += length
                continue
            if nbytes:
                copies.append((first, source, nbytes))
            first, source, nbytes = local, here, length
        if nbytes:
            copies.append((first, source, nbytes))
        return copies

    def unmap(self, driver: Driver) -> None:
        """Close every mapping; the addresses are invalid afterwards."""
        for address in (self.page, *self._mapped):
            driver.close_handle(address)


def _unregistered(address: int, nbytes: int) -> EngineError:
    text = f"{nbytes} bytes at the seed's address {address:#x} do not lie in one registered region"
    return EngineError(NAME, "read", text, side="seed")


def map_peer(driver: Driver, endpoint: Endpoint) -> MappedPeer:
    """Map the seed's allocations.

    Raises:
        EngineError: the driver refuses one, or one is shorter than the endpoint says; then none is mapped.
    """
    mapped: list[int] = []
    try:
        for each in (endpoint.page, *endpoint.allocations):
            mapped.append(_mapped(driver, each))
            _check_length(driver, mapped[-1], each)
    except EngineError:
        for address in mapped:
            with suppress(EngineError):  # the first error names the cause
                driver.close_handle(address)
        raise
    return MappedPeer(endpoint, mapped[0], mapped[1:])


def _mapped(driver: Driver, allocation: Allocation) -> int:
    """The address of a mapping of the seed's allocation.

    Raises:
        EngineError: the driver refuses, with its code, and what may be the reason.
    """
    try:
        return driver.open_handle(allocation.handle)
    except EngineError as error:
        text = (
            f"the driver cannot map the seed's memory ({error.text}): the seed has ended or freed it, or this "
            "container has no access to the seed's GPU; give it all GPUs, and choose its own by CUDA_VISIBLE_DEVICES"
        )
        raise EngineError(NAME, "connect", text, code=error.code, retry_elsewhere=True, side=error.side) from error


def _check_length(driver: Driver, address: int, allocation: Allocation) -> None:
    """Compare the length of a mapping with the seed's endpoint.

    A copy beyond the mapping fails as well, but only after some bytes have been written.

    Raises:
        EngineError: the mapping is shorter.
    """
    base, nbytes = driver.allocation_of(address, "connect")
    if base + nbytes - address < allocation.nbytes:
        raise EngineError(
            NAME,
            "connect",
            f"the seed's allocation at {allocation.base:#x} has {base + nbytes - address} bytes, and its endpoint says "
            f"{allocation.nbytes}",
            retry_elsewhere=True,
            side="seed",
        )
