"""The options of a worker: names, types, defaults, and the values that each accepts. Names are those of the guide."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vllm_rfork import messages
from vllm_rfork.config.urls import MAX_PLANNER_URLS, planner_urls

#: Without these a worker logs one WARNING, loads with the default loader and does not become a seed.
NEEDED = ("model_url", "model_deploy_strategy_name", "rfork_scheduler_url")


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
    """All options of a worker; docs/options.md describes them for users."""

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


def accepts(name: str) -> str:
    """The values that option ``name`` accepts, in a user's words."""
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
