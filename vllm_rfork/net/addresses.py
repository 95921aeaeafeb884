"""Canonical spelling of addresses and host names."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import replace

from vllm_rfork.messages import HOST, SEED_IP, BadMessage, SeedAddress

#: Forms that inet_aton() accepts besides dotted quads: ``127.1``, ``0x7f000001``, ``2130706433``, ``0177.0.0.1``.
_NUMERIC = re.compile(r"(?:0[xX][0-9a-fA-F]+|[0-9]+)(?:\.(?:0[xX][0-9a-fA-F]+|[0-9]+)){0,3}\Z")
_ZONE = re.compile(r"[A-Za-z0-9_.-]{1,15}\Z")


def canonical_host(host: str) -> str:
    """The canonical spelling of ``host``: ``127.1``, ``0x7f000001`` and ``::ffff:127.0.0.1`` are all ``127.0.0.1``.

    Host names are in lower case, without a dot at the end. Planners identify a seed by its address, and compare it
    with the caller's: two spellings would be two seeds.

    Raises:
        BadMessage: not an address or a host name, an address that no peer can connect to (``0.0.0.0``, multicast),
            or a zone (``%eth0``) behind anything but an IPv6 link-local address.
    """
    literal, percent, zone = host.strip("[]").partition("%")
    try:
        address = ipaddress.ip_address(literal)
    except ValueError:
        if _NUMERIC.match(literal):
            try:
                address = ipaddress.IPv4Address(socket.inet_aton(literal))
            except OSError as error:
                raise BadMessage(f"header {SEED_IP} is not an address: {host[:80]!r}") from error
        elif percent or ":" in literal or not HOST.match(literal):
            raise BadMessage(f"header {SEED_IP} must be a host name or an address, got {host[:80]!r}") from None
        else:
            return literal.lower().rstrip(".")
    address = getattr(address, "ipv4_mapped", None) or address
    if percent and not (address.version == 6 and address.is_link_local and _ZONE.match(zone)):
        raise BadMessage(f"header {SEED_IP} has a zone, which only an IPv6 link-local address has: {host[:80]!r}")
    if address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255":
        raise BadMessage(f"header {SEED_IP} is {address}, which no peer can connect to")
    return f"{address}{percent}{zone}"


def canonical(seed: SeedAddress) -> SeedAddress:
    """``seed`` with its host spelled as by :func:`canonical_host`. Raises BadMessage."""
    return replace(seed, host=canonical_host(seed.host))
