"""Access to the planner: bearer tokens, TLS, and the addresses that a caller may announce.

Tokens are compared in constant time and read again when their file changes. No log line, metric or error contains one.
"""

from __future__ import annotations

import enum
import ipaddress
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vllm_rfork.errors import ConfigError
from vllm_rfork.net import bearer
from vllm_rfork.net.reloaded import Reloaded
from vllm_rfork.planner.resolver import Resolver

logger = logging.getLogger(__name__)

TOKEN_VARIABLES = ("RFORK_TOKEN", "RFORK_TOKEN_PREVIOUS")
_REMEMBER_S = 300.0
_MAX_REMEMBERED = 4096


class Tokens:
    """The accepted bearer tokens: none (open to all), one, or two during a rotation.

    Args:
        path: a token file (see :mod:`vllm_rfork.net.bearer`), read again at most once a second. If it is None,
            the variables :data:`TOKEN_VARIABLES` of ``environ`` are used.

    Raises:
        ConfigError: the file cannot be used, or ``RFORK_TOKEN`` is set and blank: a token was intended, and
            without one the planner would be open to all.
    """

    def __init__(
        self, path: Path | None, environ: Mapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        paths = () if path is None else (str(path),)

        def read() -> tuple[str, ...]:
            return _from_environment(environ) if path is None else bearer.read_file(path, "token_file")

        self._tokens = Reloaded("the token file", paths, read, logger, clock=clock)

    @property
    def required(self) -> bool:
        """True if callers need a token."""
        return bool(self._tokens.current())

    def current(self) -> tuple[str, ...]:
        """Return the tokens, the one to send first."""
        return self._tokens.current()

    def admit(self, authorization: str | None) -> bool:
        """Return whether an ``Authorization`` header contains a valid token."""
        return bearer.admits(self._tokens.current(), authorization)


def _from_environment(environ: Mapping[str, str]) -> tuple[str, ...]:
    present, previous = (environ.get(name) for name in TOKEN_VARIABLES)
    tokens = [] if present is None else [bearer.checked(present.strip(), TOKEN_VARIABLES[0])]
    if previous and previous.strip():  # empty while nothing is rotated
        tokens.append(bearer.checked(previous.strip(), TOKEN_VARIABLES[1]))
    return tuple(tokens)


class ServerTls:
    """The server side of TLS 1.2 and later. New connections use a certificate that was renewed on disk.

    A new client CA is trusted as well; the earlier one stays trusted until a restart. While only one file of a pair has
    been renewed, the earlier pair stays in use.

    Raises:
        ConfigError: a file cannot be used.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        paths = tuple(str(each) for each in (cert, key, client_ca) if each is not None)
        self._files = Reloaded("the TLS files", paths, self._load, logger, recheck_s=0.0)
        if client_ca is not None:
            self.context.verify_mode = ssl.CERT_REQUIRED

    def refresh(self) -> None:
        """Load the files again if one was replaced."""
        self._files.current()

    def _load(self) -> None:
        try:
            # Without a password OpenSSL would ask for one in the terminal if the key has one.
            self.context.load_cert_chain(self._cert, self._key, password=b"")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("tls_cert", "cannot be used with tls_key", "a PEM certificate and its key") from error
        if self._client_ca is not None:
            try:
                self.context.load_verify_locations(self._client_ca)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError("tls_client_ca", "cannot be used", "a PEM file with CA certificates") from error


class Trust(enum.Enum):
    """The callers that may announce other addresses than that of their connection."""

    #: Nobody.
    OWN_ADDRESS = "own address"
    #: Callers with a token, which must have been checked.
    MEMBERS = "members"
    #: Everybody, for NAT and proxies.
    ANYBODY = "anybody"


class AddressCheck:
    """Decides whether a caller may announce an address: only its own, unless ``trust`` allows more.

    A caller on the planner's machine may announce any address of that machine. A host name must resolve to the caller;
    the answer is cached for five minutes. Members may announce any address but loopback, which would send receivers to
    themselves.
    """

    def __init__(
        self, trust: Trust, clock: Callable[[], float] = time.monotonic, resolver: Resolver | None = None
    ) -> None:
        self._trust = trust
        self._clock = clock
        self._resolver = resolver or Resolver(clock)
        self._remembered: dict[tuple[str, str], float] = {}

    async def allows(self, announced: str, peer: str | None) -> bool:
        """Return whether ``peer``, the address of the connection (None if not TCP: local), may announce an address.

        Args:
            announced: as :func:`~vllm_rfork.net.addresses.canonical_host` spells it.

        Raises:
            Unresolved: a host name could not be looked up now.
        """
        if self._trust is Trust.ANYBODY or peer is None or announced == peer:
            return True
        if self._trust is Trust.MEMBERS and not is_loopback(announced):
            return True
        now = self._clock()
        known = self._remembered.get((announced, peer))
        if known is not None and known > now:
            return True
        if not await self._is_own(announced, peer):
            return False
        if len(self._remembered) >= _MAX_REMEMBERED:
            self._remembered.clear()
        self._remembered[announced, peer] = now + _REMEMBER_S
        return True

    async def _is_own(self, announced: str, peer: str) -> bool:
        caller = _address(peer)
        if caller is None:
            return False
        literal = _address(announced)
        names = [announced] if literal is not None else await self._resolver.addresses(announced, peer)
        for address in [found for each in names if (found := _address(each)) is not None]:
            if address == caller or (caller.is_loopback and _is_of_this_machine(address)):
                return True
        return False


def is_loopback(host: str) -> bool:
    """Return whether ``host`` is a loopback address or name, judged by its spelling."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


def _is_of_this_machine(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address.is_loopback:
        return True
    if address.is_unspecified or address.is_multicast:
        return False
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))  # only an address of this machine can be bound to
    except OSError:
        return False
    return True


def tokens_from(path: Path | None) -> Tokens:
    """Return the tokens of ``path``, or of the environment if it is None."""
    return Tokens(path, os.environ)
