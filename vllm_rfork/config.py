"""A worker's settings, from ``--model-loader-extra-config`` first and from the environment second.

Option names are those of the user's guide. An unknown key that begins with ``rfork_`` fails the start: an ignored
misspelling would be noticed in an outage. All other unknown keys belong to the fallback loader.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import typing
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vllm_rfork import messages
from vllm_rfork.errors import ConfigError

#: Option → environment variable that is read if the extra config does not have it. The first five are the guide's. The
#: token has one because a secret does not belong on a command line, the others because an orchestrator sets them for
#: each machine (files that it mounts, labels), while the extra config is the same for all.
ENVIRONMENT: dict[str, str] = {
    "model_url": "MODEL_URL",
    "model_deploy_strategy_name": "MODEL_DEPLOY_STRATEGY_NAME",
    "rfork_scheduler_url": "RFORK_SCHEDULER_URL",
    "rfork_seed_timeout_sec": "RFORK_SEED_TIMEOUT_SEC",
    "rfork_seed_key_separator": "RFORK_SEED_KEY_SEPARATOR",
    "rfork_caches": "RFORK_CACHES",
    "rfork_token": "RFORK_TOKEN",
    "rfork_token_file": "RFORK_TOKEN_FILE",
    "rfork_labels": "RFORK_LABELS",
    "rfork_seed_slots": "RFORK_SEED_SLOTS",
    "rfork_tls_ca_file": "RFORK_TLS_CA_FILE",
    "rfork_tls_cert_file": "RFORK_TLS_CERT_FILE",
    "rfork_tls_key_file": "RFORK_TLS_KEY_FILE",
    "rfork_seed_tls": "RFORK_SEED_TLS",
    "rfork_seed_tls_name": "RFORK_SEED_TLS_NAME",
    "rfork_seed_tls_client_ca_file": "RFORK_SEED_TLS_CLIENT_CA_FILE",
}

#: Two forms of one option: if the extra config has either, neither is read from the environment.
_EITHER = ("rfork_token", "rfork_token_file")

#: Without these a worker logs one WARNING, loads with the default loader and does not become a seed.
NEEDED = ("model_url", "model_deploy_strategy_name", "rfork_scheduler_url")

#: Addresses of one planner: its replicas, or what stands before them.
MAX_PLANNER_URLS = 8

_PREFIX = "rfork_"
_SEPARATOR = "rfork_seed_key_separator"


def base_url(value: str) -> str:
    """A planner's base URL, without spaces around it and slashes at its end; an empty text is returned unchanged.

    It consists of ``http://`` or ``https://``, optionally a user and a password, a host, and optionally a port from 1
    to 65535 and a path.

    Raises:
        ValueError: not such a URL. The text does not quote the URL, which may contain a password.
    """
    value = value.strip()
    if not value:
        return value
    if not value.lower().startswith(("http://", "https://")):
        raise ValueError("not an http:// or https:// URL")
    if _NOT_IN_URLS.search(value):
        raise ValueError("spaces and control characters are not allowed in a URL")
    if "?" in value or "#" in value:
        raise ValueError("a base URL has no query and no fragment")
    match = _AUTHORITY.match(value.partition("://")[2].partition("/")[0])
    if match is None or (match["port"] is not None and not 1 <= int(match["port"]) <= 65535):
        raise ValueError("after :// there must be a host, and optionally a port from 1 to 65535")
    _check_host(match["host"].strip("[]"), bracketed=match["host"].startswith("["))
    return value.rstrip("/")


def planner_urls(value: str) -> str:
    """The base URLs of a planner's replicas, separated by commas, each as :func:`base_url` returns it.

    Raises:
        ValueError: one of them is unusable, there are more than ``MAX_PLANNER_URLS``, or there is nothing between two
            commas. A comma in a password must be written ``%2C``.
    """
    if "," not in value:
        return base_url(value)
    urls: dict[str, None] = {}
    for number, text in enumerate(value.split(","), start=1):
        try:
            url = base_url(text)
        except ValueError as error:
            raise ValueError(f"URL number {number}: {error}") from error
        if not url:
            raise ValueError(f"URL number {number} is empty")
        urls[url] = None
    if len(urls) > MAX_PLANNER_URLS:
        raise ValueError(f"{len(urls)} URLs")
    return ",".join(urls)


_NOT_IN_URLS = re.compile(r"[\x00-\x20\x7f\\]|\s")
#: Optionally a user and a password; a name or an address, IPv6 in brackets; optionally a port.
_AUTHORITY = re.compile(r"(?:[^\[\]@]*@)?(?P<host>\[[^\[\]]+\]|[^:\[\]]+)(:(?P<port>[0-9]{1,5}))?\Z")
#: RFC 1123, and the underscore, which container runtimes use in names.
_HOST_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)\Z")


def _check_host(host: str, *, bracketed: bool) -> None:
    """Raise ValueError if ``host`` is neither a name nor a literal address, without brackets."""
    if bracketed:
        ipaddress.IPv6Address(host)  # its error is a ValueError that names the address
        return
    try:
        labels = host.removesuffix(".").encode("idna").decode("ascii").split(".")
    except UnicodeError as error:
        raise ValueError("the host is not a name or an address") from error
    if not all(_HOST_LABEL.match(label) for label in labels):
        raise ValueError("the host is not a name or an address")
    if labels[-1].isdigit():  # a top-level domain never is, so it is an address
        ipaddress.IPv4Address(host)


def _stripped(value: Any) -> Any:
    """Strip text: a value from a file or a Secret often ends with a line break."""
    return value.strip() if isinstance(value, str) else value


def _one_line(value: str) -> str:
    if any(ord(character) < 32 for character in value):
        raise ValueError("control characters are not allowed")
    return value


def _load_format(value: str) -> str:
    """A load format in lower case. With this package's own, the loader would fall back to itself."""
    value = value.strip().lower()
    if value in ("", "rfork"):
        raise ValueError("not a format that reads from storage")
    return value


#: One fewer than on the wire: ``host`` is added if it is missing.
_MAX_LABELS = messages.MAX_LABELS - 1


def _labels(value: str) -> str:
    """``host=a,rack=b`` without the labels whose value is empty: a variable may be empty on some machines."""
    labels = messages.parse_labels(value)
    if len(labels) > _MAX_LABELS:
        raise ValueError(f"{len(labels)} labels")
    return ",".join(f"{name}={text}" for name, text in labels.items())


#: Engines in one list; a seed offers no more.
_MAX_ENGINES = 16


def _engines(value: str) -> str:
    """``auto``, or names of engines in the order in which they are tried, without the spaces around them."""
    names = [name.strip() for name in value.split(",")]
    if not all(names):
        raise ValueError("there is an empty name in the list of engines")
    if len(set(names)) < len(names):
        raise ValueError("an engine is listed twice")
    if "auto" in names[1:] or (names[0] == "auto" and len(names) > 1):
        raise ValueError("auto is not a part of a list")
    if len(names) > _MAX_ENGINES:
        raise ValueError(f"{len(names)} engines")
    return ",".join(names)


PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
Line = Annotated[str, AfterValidator(_one_line)]
#: vLLM ignores case, too.
LoadFormat = Annotated[str, AfterValidator(_one_line), AfterValidator(_load_format)]
#: Not stripped: a space may be intended.
Separator = Annotated[str, AfterValidator(_one_line), Field(min_length=1, max_length=16)]

#: Not a list in JSON: the environment and the command line have only text.
Engines = Annotated[str, AfterValidator(_one_line), AfterValidator(_engines)]

#: Accepted values of each kind of field, for the error that fails the start.
_ACCEPTS: dict[Any, str] = {
    PositiveSeconds: "a finite number of seconds greater than 0",
    Seconds: "a finite number of seconds, 0 or more",
    PositiveInt: "an integer greater than 0",
    Line: "one line of text",
    bool: "true or false",
}


class Settings(BaseModel):
    """All options of a worker; README.md describes them for users."""

    # The cause of a ConfigError is logged with it, and an input may be a token or a URL with a password.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    #: Logical model identifier; part of the seed key.
    model_url: Line = ""
    #: Deployment strategy identifier; part of the seed key.
    model_deploy_strategy_name: Line = ""
    #: Base URL of the planner, or of its replicas, separated by commas.
    rfork_scheduler_url: Annotated[str, AfterValidator(planner_urls)] = ""
    #: Bound in seconds until this worker's seed service is healthy.
    rfork_seed_timeout_sec: PositiveSeconds = 30.0
    #: Separator of the parts of the seed key; equal across compatible instances.
    rfork_seed_key_separator: Separator = "$"
    #: Bound of one request, and of the total delay of a start by an unreachable planner.
    rfork_request_timeout_sec: PositiveSeconds = 10.0
    #: Planners drop a seed after 60 s without a heartbeat; half of that allows for one lost heartbeat.
    rfork_heartbeat_interval_sec: PositiveSeconds = 30.0
    #: Address on which the seed service listens.
    rfork_seed_bind_host: Line = "0.0.0.0"  # noqa: S104 - receivers are on other hosts; the guide's behaviour
    #: The announced address; empty: the local address of the route to the planner.
    rfork_seed_advertise_host: Line = ""
    #: 0: a random port; else base + 2 * local rank + (1 for a draft).
    rfork_seed_port_base: Annotated[int, Field(ge=0, le=65000)] = 0
    #: Engines in the order in which a receiver tries them; a seed offers all. auto: by device
    #: (``engines/registry.py``).
    rfork_engine: Engines = "auto"
    #: auto: checkpoint on CPU, runtime on accelerators.
    rfork_layout: Literal["auto", "checkpoint", "runtime"] = "auto"
    #: full: verify every byte against the seed's digests; sample: one span in eight; off: none.
    rfork_verify: Literal["full", "sample", "off"] = "full"
    #: The load format if there is no seed.
    rfork_fallback_load_format: LoadFormat = "auto"
    #: false: fork, but publish nothing.
    rfork_become_seed: bool = True
    #: Caches that a start takes from its seed and offers as a seed. safe: JSON, checked against a schema. code: also
    #: compiled code, over TLS and from seeds that authenticated themselves. off: none.
    rfork_caches: Literal["off", "safe", "code"] = "safe"
    #: Bytes per native call; None: the engine's own bound.
    rfork_max_batch_bytes: PositiveInt | None = None
    #: Bound of one whole fork in seconds; after it the worker loads from storage.
    rfork_fork_timeout_sec: PositiveSeconds = 600.0
    #: The longest wait for a seed; 0: do not wait. None: as long as the planner, by its measurements, expects a wait to
    #: be faster than storage; planners that measure nothing answer at once.
    rfork_seed_wait_sec: Seconds | None = None
    #: Bearer token for planner and seed services; better given in the environment, or in a file.
    rfork_token: Annotated[Line, Field(repr=False)] = ""
    #: The same from a file, re-read when it changes: one token a line. The first is sent, both are accepted.
    rfork_token_file: Line = ""
    #: This worker's location, ``host=a,rack=b,zone=c,nic=d``, by which planners select near seeds. ``host`` defaults to
    #: the hostname.
    rfork_labels: Annotated[Line, AfterValidator(_labels)] = ""
    #: Leases that this seed carries at once; 0: the planner decides.
    rfork_seed_slots: Annotated[int, Field(ge=0, le=1000)] = 0
    #: PEM: CAs of planner and seeds; empty: the system's.
    rfork_tls_ca_file: Line = ""
    #: PEM: certificate and chain of this worker, as client and as seed service.
    rfork_tls_cert_file: Line = ""
    #: PEM: its private key; empty: in the same file.
    rfork_tls_key_file: Line = ""
    #: off: seeds use http. require: seeds use https. prefer: https if the other side supports it.
    rfork_seed_tls: Literal["off", "prefer", "require"] = "off"
    #: Name that seeds' certificates must contain; empty: the announced address of the seed.
    rfork_seed_tls_name: Line = ""
    #: PEM: CAs of callers; with them, the seed service requires a certificate from its callers.
    rfork_seed_tls_client_ca_file: Line = ""

    @property
    def missing(self) -> list[str]:
        """Required options (:data:`NEEDED`) that are not set."""
        return [name for name in NEEDED if not getattr(self, name)]

    def labels(self, hostname: str) -> str:
        """``rfork_labels``, and the hostname as ``host`` if they do not have that.

        Workers with the same hostname are on one machine or in one pod; ``localhost`` is the exception.
        """
        given = self.rfork_labels
        named = any(each.startswith("host=") for each in given.split(","))
        if named or not messages.LABEL.match(hostname) or hostname.partition(".")[0] == "localhost":
            return given
        return f"host={hostname}" + (f",{given}" if given else "")


@dataclass(frozen=True)
class ParsedConfig:
    """``settings``, and ``passed_through``: the keys that are the fallback loader's."""

    settings: Settings
    passed_through: dict[str, Any] = field(default_factory=dict)


def parse_config(extra_config: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> ParsedConfig:
    """Settings from the extra config, and from the environment for options that it does not have.

    Args:
        extra_config: ``model_loader_extra_config`` as vLLM parsed it.
        environment: defaults to ``os.environ``.

    Raises:
        ConfigError: a field is wrong, or an ``rfork_`` key does not exist; the text names it.
    """
    if extra_config is not None and not isinstance(extra_config, Mapping):
        raise ConfigError("model_loader_extra_config", f"is a {type(extra_config).__name__}", "a JSON object")
    environment = os.environ if environment is None else environment
    ours: dict[str, Any] = {}
    passed_through: dict[str, Any] = {}
    for key, value in (extra_config or {}).items():
        if key in Settings.model_fields:
            ours[key] = value
        elif str(key).lower().startswith(_PREFIX):
            raise _unknown_option(str(key))
        else:
            passed_through[key] = value
    decided = set(ours).union(_EITHER if set(_EITHER) & set(ours) else ())
    _no_blank_token(ours, decided, environment)
    for name, variable in ENVIRONMENT.items():
        text = environment.get(variable, "")
        if name not in decided and (text.strip() if name == "rfork_token" else text):
            ours[name] = _from_text(name, variable, text)
    try:
        settings = Settings(**{name: each if name == _SEPARATOR else _stripped(each) for name, each in ours.items()})
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        problem = first["msg"].removeprefix("Value error, ")
        raise ConfigError(name, problem[:1].lower() + problem[1:], _accepts(name)) from error
    _check_together(settings)
    return ParsedConfig(settings, passed_through)


def _unknown_option(key: str) -> ConfigError:
    """The error for an unknown ``rfork_`` key; suggests the nearest name."""
    known = [name for name in Settings.model_fields if name.startswith(_PREFIX)]
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}? " if near else ""
    return ConfigError(key, f"there is no such option; {hint}".rstrip("; "), f"one of {', '.join(known)}")


def _no_blank_token(given_here: Mapping[str, Any], decided: Container[str], environment: Mapping[str, str]) -> None:
    """Reject a blank token, such as from an empty Secret, and a blank name of a token file.

    Raises:
        ConfigError: the seed service would be open to everyone although a token was intended.
    """
    file_variable = ENVIRONMENT["rfork_token_file"]
    named = "" if "rfork_token_file" in decided else environment.get(file_variable, "")
    places = [(name, given_here.get(name)) for name in _EITHER]
    for where, text in (*places, (f"rfork_token_file (from {file_variable})", named)):
        if isinstance(text, str) and text and not text.strip():
            raise ConfigError(where, "is blank", "one line of text; leave it out, or empty, for none")
    variable = ENVIRONMENT["rfork_token"]
    given = environment.get(variable)
    elsewhere = "rfork_token" in decided or named
    if given is not None and not given.strip() and not elsewhere:
        raise ConfigError(f"rfork_token (from {variable})", "is blank", "a token; unset the variable for none")


def _check_together(settings: Settings) -> None:
    """Check options that depend on each other.

    Raises:
        ConfigError: an option conflicts with another one.
    """
    if settings.rfork_token and settings.rfork_token_file:
        raise ConfigError("rfork_token_file", "rfork_token is given as well", "a path, if rfork_token is not set")
    if settings.rfork_tls_key_file and not settings.rfork_tls_cert_file:
        raise ConfigError("rfork_tls_key_file", "there is no rfork_tls_cert_file", "a path beside the certificate's")
    if settings.rfork_seed_tls != "off" and settings.rfork_become_seed and not settings.rfork_tls_cert_file:
        raise ConfigError("rfork_seed_tls", "there is no rfork_tls_cert_file", "off, or a certificate beside it")
    if settings.rfork_seed_tls_client_ca_file and settings.rfork_seed_tls != "require":
        problem = f"rfork_seed_tls is {settings.rfork_seed_tls}, so callers need no certificate"
        raise ConfigError("rfork_seed_tls_client_ca_file", problem, "a path, if rfork_seed_tls is require")


def _from_text(name: str, variable: str, text: str) -> Any:
    """The text of an environment variable, converted to the type of its option."""
    kind = Settings.model_fields[name].annotation
    if kind not in (float, int):
        return text
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{name} (from {variable})", "not a number", _accepts(name)) from error


def _accepts(name: str) -> str:
    hints = typing.get_type_hints(Settings, include_extras=True)
    hint = hints.get(name)
    if hint in _ACCEPTS:
        return _ACCEPTS[hint]
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    return {
        "rfork_scheduler_url": f"a base URL such as http://planner:1223, or {MAX_PLANNER_URLS} with commas between",
        "rfork_seed_key_separator": "1 to 16 characters",
        "rfork_seed_port_base": "an integer from 0 to 65000",
        "rfork_max_batch_bytes": "an integer greater than 0",
        "rfork_fallback_load_format": "a load format of vLLM other than rfork, such as auto",
        "rfork_engine": "one line of text: auto, or engines in the order to try them, such as cuda_ipc,nixl",
        "rfork_token": "one line of text",
        "rfork_labels": f"up to {_MAX_LABELS} labels like host=a,rack=b, names and values of 1 to 63 of A-Za-z0-9_.-",
        "rfork_seed_wait_sec": _ACCEPTS[Seconds],
        "rfork_seed_slots": "an integer from 0 to 1000",
    }[name]
