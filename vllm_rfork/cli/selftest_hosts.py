"""``vllm-rfork selftest --serve`` and ``--connect``: addresses, the token, and the other host's command."""

from __future__ import annotations

import os
import secrets
import shlex
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import click

from vllm_rfork.cli.planner_api import TOKEN_VARIABLE, credentials
from vllm_rfork.config import base_url
from vllm_rfork.net.advertise import is_loopback, is_unspecified, local_address_towards
from vllm_rfork.net.credentials import Credentials
from vllm_rfork.selftest import connecting, offer, serving
from vllm_rfork.selftest.report import Report
from vllm_rfork.selftest.roles import Trial

_LOOKUP_S = 10.0
#: An address that no host has (RFC 5737): the route to it is the default route.
_ANYWHERE = "192.0.2.1"


@dataclass(frozen=True)
class Serving:
    """The options that only ``--serve`` has."""

    port: int | None
    clients: int
    once: bool


def serve(trial: Trial, engines: Sequence[str], setting: str, options: Serving, *, host: str | None) -> int:
    """Serve until the bounds are reached; returns the exit status."""
    known = credentials()
    generated = "" if known.token else secrets.token_urlsafe(24)
    if generated:
        known = Credentials(replace(known.options, token=generated))
    host = host or _own_address()
    clients = 1 if options.once else options.clients
    service = serving.Service(host, options.port, clients, trial.timeout_s, known)

    def invite(port: int) -> str:
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        command = ["vllm-rfork", "selftest", "--connect", address, "--engine", setting]
        command += ["--device", trial.device, "--size", _size(trial.nbytes)]
        token = f"{TOKEN_VARIABLE}={generated} " if generated else ""
        needs = [] if generated else [f"the token of this host ({TOKEN_VARIABLE} or RFORK_TOKEN_FILE)"]
        needs += [] if known.options.seed_tls == "off" else ["the TLS variables of a worker"]
        note = f" with {' and '.join(needs)}" if needs else ""
        return f"run this on the other host within {trial.timeout_s:g} s{note}:\n  {token}{shlex.join(command)}"

    return serving.serve(replace(trial, host=host), engines, service, invite, click.echo)


def connect(
    address: str, trial: Trial, engines: Sequence[str], setting: str, *, host: str | None, every: bool
) -> Report:
    """Read from the serving host at ``address``."""
    try:
        parts = urllib.parse.urlsplit(base_url(f"http://{address}"))
    except ValueError as error:
        raise click.BadParameter(f"{address!r}: {error}", param_hint="--connect") from error
    if not parts.hostname or parts.path or parts.username is not None:
        raise click.BadParameter(f"{address!r} is not HOST or HOST:PORT", param_hint="--connect")
    port = parts.port or offer.PORT
    if host is None:
        try:
            host = local_address_towards(parts.hostname, port, _LOOKUP_S)
        except OSError as error:
            raise click.ClickException(f"there is no route to {parts.hostname}: {error}") from error
    authority = f"[{parts.hostname}]:{port}" if ":" in parts.hostname else f"{parts.hostname}:{port}"
    return connecting.connect(
        authority, replace(trial, host=host), engines, credentials(), setting=setting, every=every
    )


def _size(nbytes: int) -> str:
    """``nbytes`` as ``--size`` accepts it, in the largest unit that is exact."""
    for unit, factor in (("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if nbytes % factor == 0:
            return f"{nbytes // factor}{unit}"
    return str(nbytes)


def _own_address() -> str:
    """The address of this host that another one can connect to. Raises UsageError."""
    host = os.environ.get("VLLM_HOST_IP", "").strip()
    if host and not is_loopback(host) and not is_unspecified(host):
        return host
    try:
        return local_address_towards(_ANYWHERE, offer.PORT, _LOOKUP_S)
    except OSError as error:
        raise click.UsageError(f"this host has no default route ({error}): give its address with --host") from error
