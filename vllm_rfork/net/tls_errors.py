"""Advice about an exchange that failed because of TLS, as one clause for the message.

OpenSSL names what it found; the advice names the option to set.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import aiohttp

#: OpenSSL's reasons if the other side does not use TLS at all.
_NO_TLS = frozenset(
    {
        "HTTP_REQUEST",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "UNEXPECTED_MESSAGE",
        "UNKNOWN_PROTOCOL",
        "WRONG_VERSION_NUMBER",
    }
)
#: Results of verification: https://docs.openssl.org/master/man3/X509_STORE_CTX_get_error/
_WRONG_NAME = frozenset({62, 64})
_WRONG_TIME = frozenset({9, 10})
_UNKNOWN_CA = frozenset({2, 7, 18, 19, 20, 21, 27})
_BROKE_OFF = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionResetError)


def advice(error: BaseException, *, tls: bool, shows_certificate: bool, service: str) -> str:
    """A clause that begins with a colon; empty if TLS is not the reason.

    Args:
        tls: the exchange used https.
        shows_certificate: this side has a certificate to show.
        service: ``planner`` or ``seed``.
    """
    found = ssl_error(error)
    if isinstance(found, ssl.SSLCertVerificationError):
        return f": {_trust(found.verify_code, service)}"
    if tls and found is not None:
        return _refused(found.reason or "", shows_certificate, service)
    if isinstance(error, _BROKE_OFF) and not isinstance(error, aiohttp.ClientConnectorError):
        if tls and not shows_certificate:
            return f" (so does a {service} that demands a client certificate: rfork_tls_cert_file)"
        if not tls and service == "planner":
            return " (so does a planner that serves https only)"
    return ""


def speaks_no_tls(error: BaseException | None) -> bool:
    """Return True if an https exchange failed because the other side uses plain http."""
    found = None if error is None else ssl_error(error)
    return found is not None and (found.reason or "") in _NO_TLS


def ssl_error(error: BaseException) -> ssl.SSLError | None:
    """The SSL error that ``error`` is, wraps or was raised from."""
    return next((each for each in _wrapped(error) if isinstance(each, ssl.SSLError)), None)


def _trust(verify_code: int, service: str) -> str:
    if verify_code in _WRONG_NAME and service == "seed":
        return "set rfork_seed_tls_name to a name in the seeds' certificates"
    if verify_code in _WRONG_NAME:
        return "set rfork_scheduler_url to a URL with a name in the planner's certificate"
    if verify_code in _WRONG_TIME:
        return f"renew the {service}'s certificate, or set this machine's clock"
    if verify_code in _UNKNOWN_CA:
        return f"set rfork_tls_ca_file to a file with the CA that signed the {service}'s certificate"
    return f"replace the {service}'s certificate; it is not valid for this use"  # key usage, strictness, revocation


def _refused(reason: str, shows_certificate: bool, service: str) -> str:
    if reason in _NO_TLS:
        way = "set rfork_seed_tls to prefer or off" if service == "seed" else "use http://"
        return f": the {service} does not use TLS; {way}"
    if "CERTIFICATE_REQUIRED" in reason or ("HANDSHAKE_FAILURE" in reason and not shows_certificate):
        return f": the {service} demands a client certificate; set rfork_tls_cert_file and rfork_tls_key_file"
    if "ALERT" in reason and ("UNKNOWN_CA" in reason or "CERTIFICATE" in reason):
        return f": the {service} rejected the certificate in rfork_tls_cert_file: it does not trust the issuing CA"
    return ""


def _wrapped(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(8):
        if error is None:
            return
        # Wrapped errors first: aiohttp's own classes are SSL errors too, without their attributes.
        for name in ("certificate_error", "os_error"):
            inner = getattr(error, name, None)
            if isinstance(inner, BaseException):
                yield inner
        yield error
        error = error.__cause__ or error.__context__
