"""The doctor's checks of a planner's host: settings, token, TLS files, store and port, as the planner will use them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping

import click

from vllm_rfork.cli.findings import FAIL, NOTE, OK, Check, Finding, find_all
from vllm_rfork.cli.planner_api import ask
from vllm_rfork.errors import ConfigError, PlannerError
from vllm_rfork.logs.quoting import counted
from vllm_rfork.messages import HEALTHZ
from vllm_rfork.planner.http.auth import ServerTls, Tokens
from vllm_rfork.planner.settings import ENVIRONMENT_PREFIX, Settings, check_environment, settings_from
from vllm_rfork.planner.store.errors import StoreUnavailable

_STORE_S, _PORT_S = 5.0, 2.0


def findings(environ: Mapping[str, str]) -> list[Finding]:
    """All findings; only that about the settings if these are wrong."""
    given = {
        name: text for name in Settings.model_fields if (text := environ.get(ENVIRONMENT_PREFIX + name.upper(), ""))
    }
    try:
        check_environment(environ)
        settings = settings_from(given, {name: ENVIRONMENT_PREFIX + name.upper() for name in given})
    except ConfigError as error:
        advice = "see vllm-rfork planner --help; flags of its command are not known here"
        return [Finding("planner settings", FAIL, str(error), advice)]
    used = counted(len(given), "variable")
    return [
        Finding("planner settings", OK, f"{used} {ENVIRONMENT_PREFIX}…; flags of its command are not known here"),
        *find_all(
            [
                Check("token", lambda: token(settings, environ)),
                Check("TLS files", lambda: tls_files(settings)),
                Check("store", lambda: store(settings), _STORE_S + 5.0),
                Check("port", lambda: port(settings), _PORT_S + 5.0),
            ]
        ),
    ]


def token(settings: Settings, environ: Mapping[str, str]) -> Finding:
    """The token that callers need."""
    try:
        tokens = Tokens(settings.token_file, environ)
    except ConfigError as error:
        return Finding("token", FAIL, str(error), "write one token a line, readable for the planner's user")
    if tokens.required:
        return Finding("token", OK, f"{counted(len(tokens.current()), 'token')}")
    advice = "set RFORK_TOKEN, or RFORK_PLANNER_TOKEN_FILE"
    return Finding("token", NOTE, "none: every caller may use the planner, and drain and lift are refused", advice)


def tls_files(settings: Settings) -> Finding:
    """Certificate and key of the planner."""
    if settings.tls_cert is None or settings.tls_key is None:
        advice = "set RFORK_PLANNER_TLS_CERT and RFORK_PLANNER_TLS_KEY, or let a proxy serve https"
        return Finding("TLS files", NOTE, "none: it serves http, and tokens can be read on the network", advice)
    try:
        ServerTls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    except ConfigError as error:
        return Finding("TLS files", FAIL, str(error), "check the files, and that the planner's user may read them")
    callers = "callers need a certificate" if settings.tls_client_ca is not None else "callers need no certificate"
    return Finding("TLS files", OK, f"usable; {callers}")


def store(settings: Settings) -> Finding:
    """The store; Redis must answer."""
    if settings.store == "memory":
        return Finding("store", OK, "memory: for one replica, which starts empty")
    try:
        from vllm_rfork.planner.store import redis_url
    except ModuleNotFoundError:
        return Finding("store", FAIL, "the Redis client is not installed", "pip install 'vllm-rfork[planner]'")
    try:
        redis_url.check(settings.store)
        asyncio.run(redis_url.ping(settings.store, _STORE_S))
    except ConfigError as error:
        return Finding("store", FAIL, str(error), "correct RFORK_PLANNER_STORE")
    except StoreUnavailable as error:
        advice = "start Redis, or check address, password, firewall and TLS; the planner waits for it"
        return Finding("store", FAIL, f"Redis does not answer: {error}", advice)
    return Finding("store", OK, "Redis answers")


def port(settings: Settings) -> Finding:
    """The port on which the planner will listen, or listens already."""
    where = f"{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if _planner_answers(settings):
                return Finding("port", OK, f"a planner listens on {where} already")
            advice = "stop the program that uses it (ss -ltnp), or choose another with RFORK_PLANNER_PORT"
            return Finding("port", FAIL, f"cannot listen on {where}: {error.strerror or error}", advice)
    return Finding("port", OK, f"{where} is free")


def _planner_answers(settings: Settings) -> bool:
    """Return True if a planner answers on the port."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    url = f"{'http' if settings.tls_cert is None else 'https'}://{f'[{host}]' if ':' in host else host}:{settings.port}"
    try:
        return ask(url, HEALTHZ, timeout_s=_PORT_S, with_token=False).status == 200
    except (PlannerError, click.UsageError):
        return False
