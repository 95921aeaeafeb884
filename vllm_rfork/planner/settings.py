"""The planner's settings: one flag and one environment variable each, with unit, default and reason.

A variable that begins with ``RFORK_PLANNER_`` and names no setting fails the start, since a misspelt setting that
is silently ignored is found out in an outage. Tokens are never settings: they come from a file or from
``RFORK_TOKEN`` and ``RFORK_TOKEN_PREVIOUS``, and appear in no listing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from vllm_rfork.errors import ConfigError
from vllm_rfork.planner.policy import POLICIES, policy_named
from vllm_rfork.planner.store.base import Rules

ENVIRONMENT_PREFIX = "RFORK_PLANNER_"


class Settings(BaseModel):
    """Everything that can be set. Names are the flags' with underscores; ``_sec`` counts seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(1223, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    store: str = Field("memory", description="memory, or redis://host:port/db (rediss:// for TLS)")
    redis_prefix: str = Field("rfork", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="names this fleet in Redis")
    leader_ttl_sec: float = Field(
        3.0, ge=0.2, le=60, description="with Redis, a replica takes over when the leading one was silent for so long"
    )
    policy: str = Field("least-loaded", description=f"choice of seed: {', '.join(sorted(POLICIES))}")
    slots: int = Field(4, ge=1, le=1000, description="leases at once of a seed that does not announce its own number")
    max_slots: int = Field(64, ge=1, le=1000, description="upper bound of the number that a seed announces")
    lease_ttl_sec: float = Field(60.0, ge=0.1, le=86400, description="a lease that is not renewed ends after this")
    seed_wait_sec: float = Field(
        0.0, ge=0, le=3600, description="wait of an older receiver, without a ticket, that does not state one"
    )
    default_wait_sec: float = Field(
        120.0,
        ge=0,
        le=3600,
        description="longest wait for a key whose loads were not measured yet; 0: no waits by ticket",
    )
    max_wait_sec: float = Field(600.0, ge=0, le=3600, description="upper bound of any wait")
    stale_after_sec: float = Field(60.0, ge=0.1, le=86400, description="a seed unseen for so long is dropped")
    sweep_every_sec: float = Field(5.0, ge=0.05, le=60, description="longest time between two sweeps")
    intent_ttl_sec: float = Field(60.0, ge=0.1, le=3600, description="an intent that is not renewed ends after this")
    failures_before_backoff: int = Field(
        3, ge=1, le=1000, description="distinct receivers that fail in a row before a quarantine"
    )
    backoff_sec: float = Field(10.0, ge=0, le=3600, description="how long at first; doubles with each further failure")
    max_backoff_sec: float = Field(300.0, ge=0, le=86400, description="upper bound of that")
    recovery_hold_sec: float = Field(
        0.0, ge=0, le=86400, description="grant nothing for so long after a start without state (fleets of old seeds)"
    )
    trust_announced_address: bool = Field(False, description="let anybody announce other addresses than their own")
    check_announced_address: bool = Field(False, description="let nobody do so, callers with a token included")
    token_file: Path | None = Field(None, description="file with one or two bearer tokens, one a line; re-read")
    tls_cert: Path | None = Field(None, description="PEM certificate chain: serve https")
    tls_key: Path | None = Field(None, description="its private key")
    tls_client_ca: Path | None = Field(None, description="PEM: ask callers for a certificate that this CA signed")
    max_key_length: int = Field(2048, ge=1, le=2048, description="characters of a seed key")
    max_keys: int = Field(10_000, ge=1, description="keys that are known at once")
    max_seeds: int = Field(200_000, ge=1, description="seeds that are known at once")
    max_waiters: int = Field(20_000, ge=0, description="receivers that wait at once; more are told not to wait")
    max_connections: int = Field(
        30_000, ge=1, description="connections at once; for a new one the longest idle one is closed"
    )
    max_history: int = Field(256, ge=0, le=10_000, description="past forks that are remembered")
    max_metric_keys: int = Field(100, ge=0, le=10_000, description="keys with metrics of their own")
    drain_sec: float = Field(10.0, ge=0, le=600, description="time for requests under way after SIGTERM")
    log_format: str = Field("text", pattern="^(text|json)$", description="text or json, one event a line")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning, error")

    def rules(self) -> Rules:
        """What the store decides by. Raises :class:`ConfigError` for an unknown policy."""
        return Rules(
            policy=policy_named(self.policy),
            lease_ttl_s=self.lease_ttl_sec,
            stale_s=self.stale_after_sec,
            intent_ttl_s=self.intent_ttl_sec,
            claim_s=min(2.0, self.lease_ttl_sec),
            default_wait_s=self.default_wait_sec,
            max_wait_s=self.max_wait_sec,
            recovery_hold_s=self.recovery_hold_sec,
            slots=self.slots,
            max_slots=self.max_slots,
            failures=self.failures_before_backoff,
            backoff_s=self.backoff_sec,
            max_backoff_s=self.max_backoff_sec,
            max_keys=self.max_keys,
            max_seeds=self.max_seeds,
            max_waiters=self.max_waiters,
            max_history=self.max_history,
        )


def settings_from(values: Mapping[str, Any], given_by: Mapping[str, str] | None = None) -> Settings:
    """Settings from flags and environment, checked against each other.

    Args:
        values: setting name → value, as text or of the setting's type.
        given_by: setting name → the flag or variable that it came from, for the message.

    Raises:
        ConfigError: the first thing that is wrong, by the field's name, with the value and where it came from.
    """
    try:
        settings = Settings.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise _wrong(error, values, given_by or {}) from error
    if settings.store != "memory" and not settings.store.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError("store", "unknown kind of store", "memory or redis://host:port/db")
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigError("tls_cert", "needs tls_key, and the other way round", "both or neither")
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        raise ConfigError("tls_client_ca", "needs tls_cert and tls_key", "a PEM file beside those")
    if settings.trust_announced_address and settings.check_announced_address:
        raise ConfigError("check_announced_address", "trust_announced_address says the opposite", "one of them")
    policy_named(settings.policy)
    return settings


def _wrong(error: pydantic.ValidationError, values: Mapping[str, Any], given_by: Mapping[str, str]) -> ConfigError:
    """The first problem of ``error``. No setting that can fail here is a secret."""
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if name not in Settings.model_fields:
        return ConfigError(name, first["msg"], "one of the known settings")
    source = given_by.get(name, "")
    problem = f"cannot be {str(values[name])[:80]!r}"
    if source.startswith(ENVIRONMENT_PREFIX) and _SERVICE_URL.match(str(values[name])):
        problem += f"; {_kubernetes(source)}"
    return ConfigError(f"{name} (from {source})" if source else name, problem, accepted(name))


_BOUNDS = (("from", "ge"), ("to", "le"))


def accepted(name: str) -> str:
    """What the setting ``name`` accepts, in a user's words."""
    field = Settings.model_fields[name]
    bounds = {
        word: getattr(each, word) for each in field.metadata for word in ("ge", "le", "pattern") if hasattr(each, word)
    }
    if field.annotation in (int, float):
        kind = "an integer" if field.annotation is int else "a number of seconds"
        return (
            kind
            + (f" from {bounds['ge']:g}" if "ge" in bounds else "")
            + (f" to {bounds['le']}" if "le" in bounds else "")
        )
    if "pattern" in bounds:
        words = re.fullmatch(r"\^\(([a-z|]+)\)\$", bounds["pattern"])
        return "one of " + ", ".join(words[1].split("|")) if words else f"text of the form {bounds['pattern']}"
    if field.annotation is bool:
        return "true or false"
    return "a path" if field.annotation == Path | None else "text"


#: Variables that Kubernetes sets in a pod for each Service of its namespace, here for one called ``rfork-planner…``.
_SERVICE_VARIABLE = re.compile(
    r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)\Z"
)
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


def _kubernetes(variable: str) -> str:
    return (
        f"Kubernetes sets {variable} for a Service called rfork-planner: set enableServiceLinks: false in the pod's "
        "spec, or give the Service another name"
    )


def check_environment(names: Iterable[str]) -> None:
    """Refuse variables that look like settings and are none.

    Raises:
        ConfigError: names the first such variable.
    """
    known = {ENVIRONMENT_PREFIX + field.upper() for field in Settings.model_fields}
    for name in sorted(names):
        if name.startswith(ENVIRONMENT_PREFIX) and name not in known:
            problem = "no such setting"
            if _SERVICE_VARIABLE.match(name):
                problem += f"; {_kubernetes(name)}"
            raise ConfigError(name, problem, f"{ENVIRONMENT_PREFIX}<FLAG IN CAPITALS>")
