"""The address under which other machines reach this worker. Must not announce it, nor import torch or vLLM."""

from __future__ import annotations

import concurrent.futures
import ipaddress
import os
import socket
import threading
import urllib.parse
from typing import Any

from vllm_rfork.config import Settings
from vllm_rfork.worker_log import worker_logger

logger = worker_logger(__name__)


def advertise_host(settings: Settings) -> str:
    """The address that peers reach this host under: the option, ``VLLM_HOST_IP``, or the route to the planner.

    Empty where there is none of them, or only a loopback address for a planner that is elsewhere: announced to
    others, that would send them to themselves.

    Raises:
        TimeoutError: the planner's name could not be looked up within ``rfork_request_timeout_sec``.
    """
    parts = urllib.parse.urlsplit(settings.rfork_scheduler_url)
    if host := settings.rfork_seed_advertise_host:
        if is_loopback(host) and not is_loopback(parts.hostname or ""):
            logger.warning(
                "rfork_seed_advertise_host is %s: no other machine can fork from this worker under that", host
            )
        return host
    if (host := os.environ.get("VLLM_HOST_IP", "")) and not is_loopback(host):
        return host
    try:
        family, kind, _, _, address = _look_up(
            parts.hostname or "", parts.port or 80, settings.rfork_request_timeout_sec
        )
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # a datagram socket: finds the route, sends nothing
            return str(probe.getsockname()[0])
    except TimeoutError:
        raise
    except OSError as error:
        logger.warning("no route to the planner at %s: %s", parts.hostname, error)
        return ""


def is_loopback(host: str) -> bool:
    """Whether ``host``, an address or ``localhost``, is this machine's own, by its spelling alone."""
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _look_up(host: str, port: int, timeout_s: float) -> Any:
    """The first datagram address of ``host``; the lookup blocks as long as the resolver likes, so a thread does it.

    Raises:
        TimeoutError: no answer within ``timeout_s`` seconds.
        OSError: there is no such name.
    """
    answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def look_up() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0])
        except (OSError, UnicodeError) as error:
            answer.set_exception(OSError(str(error)))

    threading.Thread(target=look_up, name="rfork-lookup", daemon=True).start()
    try:
        return answer.result(timeout_s)
    except concurrent.futures.TimeoutError as error:
        raise TimeoutError(
            f"the planner's host {host} was not found within {timeout_s:g} s (rfork_request_timeout_sec)"
        ) from error
