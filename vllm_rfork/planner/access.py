"""Who may call, and what a caller may announce: bearer tokens, TLS, addresses.

Tokens are compared as digests in constant time, are re-read when their file changes, and never leave this
module: no log line, metric or error text holds one.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from vllm_rfork.errors import ConfigError
from vllm_rfork.planner.resolver import Resolver

logger = logging.getLogger(__name__)

TOKEN_VARIABLES = ("RFORK_TOKEN", "RFORK_TOKEN_PREVIOUS")
_MAX_TOKENS = 2
_RECHECK_S = 1.0
_REMEMBER_S = 300.0
_MAX_REMEMBERED = 4096


class Tokens:
    """The tokens that open the planner: none (open to all), one, or two while they are being rotated.

    Args:
        path: a file with one token a line, looked at again at most once a second; ``environ`` counts otherwise.

    Raises:
        ConfigError: the file cannot be read, or holds none or more than two.
    """

    def __init__(
        self, path: Path | None, environ: Mapping[str, str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._clock = clock
        self._checked_at = clock()
        self._version: tuple[int, ...] = ()
        self._digests: tuple[bytes, ...] = ()
        if path is None:
            self._digests = _digests([environ.get(name, "") for name in TOKEN_VARIABLES])
        else:
            self._version, self._digests = _version(path, "token_file"), _read(path)

    @property
    def required(self) -> bool:
        """Callers must have a token."""
        return bool(self._digests)

    def admit(self, authorization: str | None) -> bool:
        """Whether an ``Authorization`` header opens the planner."""
        self._refresh()
        if not self._digests:
            return True
        scheme, _, token = (authorization or "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        # Both are compared whatever the first says, so that time tells nothing.
        matches = [hmac.compare_digest(given, each) for each in self._digests]
        return scheme.lower() == "bearer" and any(matches)

    def _refresh(self) -> None:
        now = self._clock()
        if self._path is None or now - self._checked_at < _RECHECK_S:
            return
        self._checked_at = now
        try:
            version = _version(self._path, "token_file")
            if version != self._version:
                self._version, self._digests = version, _read(self._path)
                logger.info("Bearer tokens re-read: %d valid", len(self._digests))
        except ConfigError as error:
            logger.warning("The token file changed and cannot be used; the earlier tokens stay valid: %s", error)


def _version(path: Path, field: str) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(field, error.strerror or "cannot be read", "a readable file") from error
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _read(path: Path) -> tuple[bytes, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("token_file", "cannot be read", "a readable text file") from error
    digests = _digests(lines)
    if not 1 <= len(digests) <= _MAX_TOKENS:
        raise ConfigError("token_file", f"holds {len(digests)} tokens", "one token, or two while rotating, one a line")
    return digests


def _digests(tokens: list[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(each.strip().encode("utf-8")).digest() for each in tokens if each.strip())


class ServerTls:
    """The server's side of TLS 1.2 and later; new connections use a certificate that was renewed on disk.

    A client CA that was exchanged is trusted from then on as well; the earlier one stays trusted until a restart.

    Raises:
        ConfigError: a file cannot be used.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._version = self._load()
        if client_ca is not None:
            self.context.verify_mode = ssl.CERT_REQUIRED

    def refresh(self) -> None:
        """Load the files again if one was replaced; a half-written pair keeps the old one."""
        try:
            if self._version != self._versions():
                self._version = self._load()
                logger.info("TLS files re-read: %s", self._cert)
        except ConfigError as error:
            logger.warning("The TLS files changed and cannot be used; the earlier ones stay: %s", error)

    def _versions(self) -> tuple[tuple[int, ...], ...]:
        own = _version(self._cert, "tls_cert"), _version(self._key, "tls_key")
        return own if self._client_ca is None else (*own, _version(self._client_ca, "tls_client_ca"))

    def _load(self) -> tuple[tuple[int, ...], ...]:
        version = self._versions()
        try:
            # Without a password OpenSSL would ask the terminal for that of a key which has one.
            self.context.load_cert_chain(self._cert, self._key, password=b"")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("tls_cert", "cannot be used with tls_key", "a PEM certificate and its key") from error
        if self._client_ca is not None:
            try:
                self.context.load_verify_locations(self._client_ca)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError("tls_client_ca", "cannot be used", "a PEM file with CA certificates") from error
        return version


class Trust(enum.Enum):
    """Who may announce other addresses than the one that its connection comes from."""

    #: Nobody.
    OWN_ADDRESS = "own address"
    #: Callers with a token. The caller must have been let in by one.
    MEMBERS = "members"
    #: Everybody: NAT, proxies.
    ANYBODY = "anybody"


class AddressCheck:
    """Whether a caller may announce an address: its own only, unless ``trust`` says otherwise.

    A caller on the planner's own machine may name any address of that machine. A host name must resolve to the
    caller; the answer is remembered for five minutes. Members may name any address but loopback, which would send
    receivers to themselves.
    """

    def __init__(
        self, trust: Trust, clock: Callable[[], float] = time.monotonic, resolver: Resolver | None = None
    ) -> None:
        self._trust = trust
        self._clock = clock
        self._resolver = resolver or Resolver(clock)
        self._remembered: dict[tuple[str, str], float] = {}

    async def allows(self, announced: str, peer: str | None) -> bool:
        """``peer`` is the address that the connection comes from; None (no TCP) is trusted as local.

        Args:
            announced: as :func:`~vllm_rfork.messages.canonical_host` spells it.

        Raises:
            Unresolved: a host name could not be looked up now; asking again may help.
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
    """Whether ``host`` is the address or the name of the machine itself, by its spelling alone."""
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
    """The tokens of ``path``, or of the environment where it is None."""
    return Tokens(path, os.environ)
