"""Bearer token and TLS configuration of a worker, as client and as server.

Files are checked on use, at most once a second, so that a secret which an orchestrator rotates is used without a
restart. If a file becomes unusable, its earlier content stays in use. No log line or error contains a token or a key.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_rfork.config import Settings
from vllm_rfork.errors import ConfigError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.net import bearer
from vllm_rfork.net.reloaded import Reloaded

logger = worker_logger(__name__)


@dataclass(frozen=True)
class Options:
    """The settings of the same names, without their prefix; see ``config/settings.py``."""

    token: str = field(default="", repr=False)
    token_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    seed_tls: str = "off"
    seed_name: str = ""
    client_ca_file: str = ""

    @property
    def has_tls(self) -> bool:
        """Return True if a client needs more than the system's CAs."""
        return bool(self.ca_file or self.cert_file)

    @property
    def tls_files(self) -> tuple[str, ...]:
        """The files of the client's side of TLS."""
        return tuple(filter(None, (self.ca_file, self.cert_file, self.key_file)))


class Credentials:
    """Token and TLS of one worker; safe to use from several threads.

    Raises:
        ConfigError: a file that is named cannot be used; names the option.
    """

    def __init__(self, options: Options | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options = options or Options()
        self._tokens = Reloaded(
            "the token file",
            (options.token_file,) if options.token_file else (),
            lambda: _tokens(options),
            logger,
            clock=clock,
        )
        self._client = (
            Reloaded("the TLS files", options.tls_files, lambda: client_context(options), logger, clock=clock)
            if options.has_tls
            else None
        )
        server_files = tuple(filter(None, (options.cert_file, options.key_file, options.client_ca_file)))
        self._server = (
            Reloaded("the seed service's TLS files", server_files, lambda: server_context(options), logger, clock=clock)
            if options.seed_tls != "off" and options.cert_file
            else None
        )

    @classmethod
    def of(cls, settings: Settings) -> Credentials:
        """The credentials that ``settings`` name.

        Raises:
            ConfigError: see the class.
        """
        return cls(
            Options(
                token=settings.rfork_token,
                token_file=settings.rfork_token_file,
                ca_file=settings.rfork_tls_ca_file,
                cert_file=settings.rfork_tls_cert_file,
                key_file=settings.rfork_tls_key_file,
                seed_tls=settings.rfork_seed_tls,
                seed_name=settings.rfork_seed_tls_name,
                client_ca_file=settings.rfork_seed_tls_client_ca_file,
            )
        )

    @property
    def token(self) -> str:
        """The token to send; empty if there is none."""
        tokens = self._tokens.current()
        return tokens[0] if tokens else ""

    def admit(self, authorization: str) -> bool:
        """Return True if the ``Authorization`` header has one of the tokens, or if there are none."""
        return bearer.admits(self._tokens.current(), authorization)

    def code_obstacle(self) -> str | None:
        """The setting without which a worker must not run code from a seed; None if it may.

        The seed must have proven to be of the fleet, by a certificate of the fleet's own CA: any site has one of the
        system's. With ``prefer``, an attacker on the path can turn TLS off.
        """
        options = self.options
        if options.seed_tls != "require":
            return f"set rfork_seed_tls to require: it is {options.seed_tls}"
        if not options.ca_file:
            return "set rfork_tls_ca_file to the fleet's own CA"
        if not (options.cert_file or self.token):
            return "set rfork_token_file, or rfork_tls_cert_file with a client certificate"
        return None

    def code_serving_obstacle(self) -> str | None:
        """The setting without which a seed must not send compiled code, which quotes source text; None if it may."""
        options = self.options
        if options.seed_tls != "require":
            return f"set rfork_seed_tls to require: it is {options.seed_tls}"
        if not (options.client_ca_file or self.token):
            return "set rfork_token_file, or rfork_seed_tls_client_ca_file, so that callers must prove themselves"
        return None

    def client_context(self) -> ssl.SSLContext | None:
        """The context of https calls; None means the system's CAs and no certificate of this worker."""
        return None if self._client is None else self._client.current()

    def server_context(self) -> ssl.SSLContext | None:
        """The context of this worker's seed service; None if it serves http, or if there is no certificate."""
        return None if self._server is None else self._server.current()

    def needed_server_context(self) -> ssl.SSLContext:
        """As :meth:`server_context`. Raises ValueError instead of returning None."""
        context = self.server_context()
        if context is None:
            raise ValueError("the seed service has no TLS")
        return context


# --- from files to contexts -----------------------------------------------------------------------------------------


def _tokens(options: Options) -> tuple[str, ...]:
    if options.token_file:
        return bearer.read_file(options.token_file, "rfork_token_file")
    return (options.token,) if options.token else ()


def client_context(options: Options) -> ssl.SSLContext:
    """TLS 1.2 and later, with the CAs and the certificate of ``options``.

    Raises:
        ConfigError: a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=options.ca_file or None)
    except (OSError, ValueError) as error:
        raise _unusable("rfork_tls_ca_file", error, "a PEM file with CA certificates") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if options.cert_file:
        _load_certificate(context, options)
    return context


def server_context(options: Options) -> ssl.SSLContext:
    """TLS 1.2 and later with the certificate of ``options``; requests client certificates if a client CA is set.

    A caller without a certificate passes the handshake, so that the service can answer it with a text. One whose
    certificate the CA did not sign does not.

    Raises:
        ConfigError: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificate(context, options)
    if options.client_ca_file:
        try:
            context.load_verify_locations(options.client_ca_file)
        except (OSError, ValueError) as error:
            raise _unusable("rfork_seed_tls_client_ca_file", error, "a PEM file with CA certificates") from error
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _load_certificate(context: ssl.SSLContext, options: Options) -> None:
    try:
        # Without a password OpenSSL would prompt for one on the terminal if the key is encrypted.
        context.load_cert_chain(options.cert_file, options.key_file or None, password=b"")
    except (OSError, ValueError) as error:
        accepts = "a PEM certificate that fits the key in rfork_tls_key_file, which has no password"
        raise _unusable("rfork_tls_cert_file", error, accepts) from error


def _unusable(name: str, error: Exception, accepts: str) -> ConfigError:
    reason = getattr(error, "strerror", None) or getattr(error, "reason", None) or type(error).__name__
    return ConfigError(name, f"cannot be used ({reason})", accepts)
