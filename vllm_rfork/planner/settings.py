"""The planner's settings: each has one flag and one environment variable.

A variable that begins with ``RFORK_PLANNER_`` and is not a setting fails the start, because a misspelt setting that is
ignored would be noticed only in an outage. Tokens are not settings: they come from a file or from ``RFORK_TOKEN`` and
``RFORK_TOKEN_PREVIOUS``.
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
    """All settings. The names are those of the flags, with underscores; ``_sec`` is in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(1223, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    store: str = Field("memory", description="memory, or redis://host:port/db (rediss:// for TLS)")
    redis_prefix: str = Field("rfork", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="name of this fleet in Redis")
    leader_ttl_sec: float = Field(
        3.0, ge=0.2, le=60, description="with Redis, a replica takes over when the leader was silent for this long"
    )
    store_wait_sec: float = Field(
        0.0, ge=0, le=86400, description="at the start, end if the store is unavailable for this long; 0: wait for it"
    )
    policy: str = Field("least-loaded", description=f"choice of seed: {', '.join(sorted(POLICIES))}")
    slots: int = Field(4, ge=1, le=1000, description="leases at once of a seed that does not announce a number")
    max_slots: int = Field(64, ge=1, le=1000, description="upper bound of the number of leases that a seed announces")
    lease_ttl_sec: float = Field(60.0, ge=0.1, le=86400, description="lifetime of a lease that is not renewed")
    seed_wait_sec: float = Field(
        0.0, ge=0, le=3600, description="wait of a receiver that sends neither a ticket nor a wait (older workers)"
    )
    default_wait_sec: float = Field(
        120.0,
        ge=0,
        le=3600,
        description="longest wait for a key without a measured load; 0: no waits by ticket",
    )
    max_wait_sec: float = Field(600.0, ge=0, le=3600, description="upper bound of every wait")
    stale_after_sec: float = Field(60.0, ge=0.1, le=86400, description="drop a seed without a heartbeat for this long")
    sweep_every_sec: float = Field(5.0, ge=0.05, le=60, description="longest time between two sweeps")
    intent_ttl_sec: float = Field(60.0, ge=0.1, le=3600, description="lifetime of an intent that is not renewed")
    failures_before_backoff: int = Field(
        3, ge=1, le=1000, description="distinct receivers whose forks fail in a row before a seed is quarantined"
    )
    backoff_sec: float = Field(10.0, ge=0, le=3600, description="length of the first quarantine; doubles each time")
    max_backoff_sec: float = Field(300.0, ge=0, le=86400, description="upper bound of the length of a quarantine")
    recovery_hold_sec: float = Field(
        0.0, ge=0, le=86400, description="grant nothing for this long after a start without state (legacy seeds)"
    )
    trust_announced_address: bool = Field(False, description="let every caller announce other addresses than its own")
    check_announced_address: bool = Field(False, description="let no caller do so, even with a token")
    token_file: Path | None = Field(None, description="file with one or two bearer tokens, one a line; re-read")
    tls_cert: Path | None = Field(None, description="PEM file with a certificate chain; serves https")
    tls_key: Path | None = Field(None, description="PEM file with the private key of tls_cert")
    tls_client_ca: Path | None = Field(None, description="PEM file; callers need a certificate of this CA")
    max_key_length: int = Field(2048, ge=1, le=2048, description="maximum length of a seed key, in characters")
    max_keys: int = Field(10_000, ge=1, description="maximum number of keys")
    max_seeds: int = Field(200_000, ge=1, description="maximum number of seeds")
    max_waiters: int = Field(20_000, ge=0, description="maximum number of waiting receivers; more are refused a wait")
    max_connections: int = Field(
        30_000, ge=1, description="maximum number of connections; a new one replaces the one that was idle longest"
    )
    max_history: int = Field(256, ge=0, le=10_000, description="number of past forks that are kept")
    max_metric_keys: int = Field(100, ge=0, le=10_000, description="number of keys with metrics of their own")
    drain_sec: float = Field(10.0, ge=0, le=600, description="time for open requests after SIGTERM")
    log_format: str = Field("text", pattern="^(text|json)$", description="text or json, one event per line")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="debug, info, warning, error")

    def rules(self) -> Rules:
        """Return the rules of the store. Raises :class:`ConfigError` for an unknown policy."""
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
    """Make settings of flags and environment, and check them against each other.

    Args:
        values: setting name → value, as text or of the setting's type.
        given_by: setting name → the flag or variable that gave it, for the message.

    Raises:
        ConfigError: the first problem, with the name of the setting, the value and its source.
    """
    try:
        settings = Settings.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise _wrong(error, values, given_by or {}) from error
    if settings.store != "memory" and not settings.store.startswith(("redis://", "rediss://", "unix://")):
        raise ConfigError("store", "unknown kind of store", "memory or redis://host:port/db")
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigError("tls_cert", "needs tls_key, and tls_key needs tls_cert", "both or neither")
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        raise ConfigError("tls_client_ca", "needs tls_cert and tls_key", "a PEM file, with tls_cert and tls_key")
    if settings.trust_announced_address and settings.check_announced_address:
        raise ConfigError("check_announced_address", "contradicts trust_announced_address", "one of the two")
    policy_named(settings.policy)
    return settings


def _wrong(error: pydantic.ValidationError, values: Mapping[str, Any], given_by: Mapping[str, str]) -> ConfigError:
    """Return the first problem of ``error``. No setting that can fail here is a secret."""
    first = error.errors(include_url=False, include_input=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    if name not in Settings.model_fields:
        return ConfigError(name, first["msg"], "one of the known settings")
    source = given_by.get(name, "")
    problem = f"cannot be {str(values[name])[:80]!r}"
    if source.startswith(ENVIRONMENT_PREFIX) and _SERVICE_URL.match(str(values[name])):
        problem += f"; {_kubernetes(source)}"
    return ConfigError(f"{name} (from {source})" if source else name, problem, accepted(name))


def accepted(name: str) -> str:
    """Describe the values that the setting ``name`` accepts, for users."""
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


#: Variables that Kubernetes sets in a pod for each Service of its namespace, here for one named ``rfork-planner…``.
_SERVICE_VARIABLE = re.compile(
    r".*_(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)\Z"
)
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


def _kubernetes(variable: str) -> str:
    return (
        f"Kubernetes sets {variable} for a Service named rfork-planner: set enableServiceLinks: false in the pod's "
        "spec, or give the Service another name"
    )


def check_environment(names: Iterable[str]) -> None:
    """Refuse variables that look like settings but are not.

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
