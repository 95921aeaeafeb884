"""The calls between the two hosts of a self-test, over the package's bounded HTTP server and client.

- ``GET /rfork_selftest`` returns the offer: the seeds that the serving host holds, as JSON.
- ``GET /rfork_selftest/done`` reports the end of one client's run: ``client`` from the offer, ``code`` and ``lane``.

Both need the bearer token.
"""

from __future__ import annotations

import msgspec

from vllm_rfork.engines import host, rdma
from vllm_rfork.selftest.roles import Published

OFFER, DONE = "/rfork_selftest", "/rfork_selftest/done"
#: The default port of the serving host.
PORT = 1224
VERSION = 1
#: NIXL's endpoints have about 60 bytes a buffer, the buffers' own rows about 170.
MAX_OFFER_NBYTES = 64 * 1024 * 1024
MAX_ENGINES = 16
_MAX_ADDRESS = 1 << 63


class Host(msgspec.Struct, frozen=True):
    """The facts of one side that decide which lanes are possible.

    Attributes:
        boot: identifies the running kernel, so that two containers of one host recognize each other; empty: unknown.
        rdma_obstacle: why it cannot use RDMA; None if it can.
    """

    boot: str
    rdma_obstacle: str | None

    @classmethod
    def here(cls) -> Host:
        """The facts of this host."""
        return cls(host.boot_id_if_known(), rdma.rdma_obstacle())


class Seed(msgspec.Struct, frozen=True):
    """One engine of the serving host: its published buffers, or the reason why there are none."""

    engine: str
    published: Published | None = None
    reason: str = ""


class Offer(msgspec.Struct, frozen=True):
    """The answer to :data:`OFFER`. ``client`` identifies the run that begins with it."""

    v: int
    client: str
    device: str
    host: Host
    seeds: list[Seed]


class UnusableOffer(ValueError):
    """The answer is not an offer that this side can use."""


def decode(body: bytes, most_nbytes: int) -> Offer:
    """The offer in ``body``.

    Raises:
        UnusableOffer: it is malformed, of another version, or offers more than ``most_nbytes`` bytes.
    """
    try:
        offer = msgspec.json.decode(body, type=Offer)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UnusableOffer(f"the serving host's offer is malformed: {error}") from error
    if offer.v != VERSION:
        raise UnusableOffer(f"the serving host's offer has version {offer.v}, not {VERSION}: use one version on both")
    if len(offer.seeds) > MAX_ENGINES:
        raise UnusableOffer(f"the serving host offers {len(offer.seeds)} engines")
    for seed in offer.seeds:
        if seed.published is not None:
            _check(seed.published, most_nbytes)
    return offer


def _check(published: Published, most_nbytes: int) -> None:
    """Check the buffers before memory is allocated for them. Raises UnusableOffer."""
    for address, nbytes, _ in published.buffers:
        if not (0 < address < _MAX_ADDRESS and 0 < nbytes < _MAX_ADDRESS):
            raise UnusableOffer(f"the serving host offers {nbytes} bytes at address {address}")
    if published.nbytes > most_nbytes:
        raise UnusableOffer(
            f"the serving host offers {published.nbytes} bytes, more than {most_nbytes}: give both sides one --size"
        )
