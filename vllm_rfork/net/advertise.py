"""The advertised address: the one under which other machines reach this worker."""

from __future__ import annotations

import ipaddress
import os
import socket
import time
import urllib.parse
from typing import Any

from vllm_rfork.config import Settings
from vllm_rfork.errors import ConfigError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import BadMessage
from vllm_rfork.net.addresses import canonical_host
from vllm_rfork.threads.deadline import DeadlineExceeded, call_with_deadline

logger = worker_logger(__name__)


#: Timeout of all attempts to connect to the planner together, in seconds. After that the route decides.
_CONNECT_TIMEOUT_S = 1.0
#: ``rfork_seed_bind_host``'s default.
_EVERY_IPV4 = "0.0.0.0"  # noqa: S104
_EVERY_ADDRESS = "::"


def advertise_host(settings: Settings) -> str | None:
    """The advertised address: the option, else ``VLLM_HOST_IP``, else the local address towards the planner.

    The last is the local address of a connection to the planner, or of the route if the planner accepts none yet. None
    if there is no route to any planner.

    Raises:
        ConfigError: ``rfork_seed_advertise_host`` is ``0.0.0.0`` or ``::``.
        TimeoutError: the planner's name could not be resolved within ``rfork_request_timeout_sec``.
    """
    planners = [urllib.parse.urlsplit(url) for url in settings.rfork_scheduler_url.split(",")]
    planner_is_local = all(is_loopback(planner.hostname or "") for planner in planners)
    if host := settings.rfork_seed_advertise_host:
        if is_unspecified(host):
            problem = f"is {host}, which no other machine can connect to"
            raise ConfigError("rfork_seed_advertise_host", problem, "an address or name of this host, or nothing")
        if is_loopback(host) and not planner_is_local:
            logger.warning(
                "rfork_seed_advertise_host is %s: no other machine can fork from this worker under that", host
            )
        return host
    if host := os.environ.get("VLLM_HOST_IP", "").strip():
        unspecified = is_unspecified(host)
        if not unspecified and not is_loopback(host):
            return host
        if unspecified or not planner_is_local:
            logger.warning(
                "VLLM_HOST_IP is %s, which no other machine can connect to: it is not announced. Set it, or "
                "rfork_seed_advertise_host, to an address of this host that other workers reach",
                host,
            )
    return _reached_from(planners, settings.rfork_request_timeout_sec)


def _reached_from(planners: list[urllib.parse.SplitResult], timeout_s: float) -> str | None:
    """The local address towards the first of ``planners`` whose name is found. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    late: TimeoutError | None = None
    for number, planner in enumerate(planners):
        host = planner.hostname or ""
        port = planner.port or (443 if planner.scheme == "https" else 80)
        try:
            found = _look_up(host, port, (deadline - time.monotonic()) / (len(planners) - number))
            return _connected_from(found) or _routed_from(found[0])
        except TimeoutError as error:
            late = error
        except OSError as error:
            logger.warning("There is no route to the planner at %s: %s", host, error)
    if late is not None:
        raise late
    return None


def listen_host(bind_host: str, advertised: str) -> str:
    """The address on which a service listens that is announced as ``advertised``: ``bind_host``, or ``::``.

    ``0.0.0.0``, the default, means every address, including IPv6 if the advertised address is an IPv6 address.
    """
    return _EVERY_ADDRESS if bind_host == _EVERY_IPV4 and ":" in advertised else bind_host


def local_address_towards(host: str, port: int, timeout_s: float) -> str:
    """The local address of the route to ``host``, a name or an address; nothing is sent there.

    Raises:
        OSError: the name is not found within ``timeout_s`` seconds, or there is no route.
    """
    return _routed_from(_look_up(host, port, timeout_s)[0])


def is_loopback(host: str) -> bool:
    """Return True if ``host`` is a loopback address or ``localhost``, by its spelling alone."""
    address = _address(host)
    return host.lower().rstrip(".") == "localhost" if address is None else address.is_loopback


def is_unspecified(host: str) -> bool:
    """Return True if ``host`` is ``0.0.0.0``, ``::`` or another spelling of them."""
    address = _address(host)
    return address is not None and address.is_unspecified


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """``host`` as an address; None for a name."""
    try:
        address = ipaddress.ip_address(canonical_host(host))
    except BadMessage:
        return ipaddress.IPv4Address(0)  # not an address of one host
    except ValueError:
        return None
    return address


def _connected_from(addresses: list[Any]) -> str | None:
    """The local address of the first connection that the planner accepts; None if it accepts none in time."""
    deadline = time.monotonic() + _CONNECT_TIMEOUT_S
    for number, (family, kind, _, _, address) in enumerate(addresses):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        try:
            with socket.socket(family, kind) as connection:
                connection.settimeout(left_s / (len(addresses) - number))
                connection.connect(address)
                return str(connection.getsockname()[0])
        except OSError as error:
            logger.debug("The planner cannot be reached at %s: %s", address[0], error)
    return None


def _routed_from(found: Any) -> str:
    """The local address of the route to ``found``. Raises OSError if there is none."""
    family, _, _, _, address = found
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # a datagram socket: finds the route, sends nothing
        return str(probe.getsockname()[0])


def _look_up(host: str, port: int, timeout_s: float) -> Any:
    """The addresses of ``host`` for streams, as ``getaddrinfo`` lists them.

    The lookup may block for as long as the resolver does, so it runs on a thread.

    Raises:
        TimeoutError: no answer within ``timeout_s`` seconds.
        OSError: there is no such name.
    """

    def look_up() -> Any:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

    try:
        return call_with_deadline(look_up, timeout_s, "rfork-lookup", delays_exit=False)
    except UnicodeError as error:
        raise OSError(str(error)) from error
    except DeadlineExceeded as error:
        raise TimeoutError(
            f"the planner's host {host} was not found within {timeout_s:g} s (rfork_request_timeout_sec)"
        ) from error
