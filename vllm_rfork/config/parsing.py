"""Settings from ``--model-loader-extra-config`` first and from the environment second.

An unknown key that begins with ``rfork_`` fails the start: an ignored misspelling would be noticed in an outage. All
other unknown keys belong to the fallback loader.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic

from vllm_rfork.config.settings import Settings, accepts
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

_PREFIX = "rfork_"
_SEPARATOR = "rfork_seed_key_separator"


@dataclass(frozen=True)
class ParsedConfig:
    """``settings``, and ``passed_through``: the keys that are the fallback loader's."""

    settings: Settings
    passed_through: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExaminedConfig(ParsedConfig):
    """A configuration that may have errors.

    Attributes:
        settings: of the options without an error.
        errors: everything that is wrong; a start fails with the first of them.
        variables: option → environment variable that it is from.
    """

    errors: tuple[ConfigError, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


def parse_config(extra_config: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> ParsedConfig:
    """Settings from the extra config, and from the environment for options that it does not have.

    Args:
        extra_config: ``model_loader_extra_config`` as vLLM parsed it.
        environment: defaults to ``os.environ``.

    Raises:
        ConfigError: a field is wrong, or an ``rfork_`` key does not exist; the text names it.
    """
    examined = examine_config(extra_config, environment)
    for error in examined.errors:
        raise error
    return ParsedConfig(examined.settings, examined.passed_through)


def examine_config(extra_config: object, environment: Mapping[str, str] | None = None) -> ExaminedConfig:
    """The same as :func:`parse_config`, with all errors instead of the first one."""
    if extra_config is not None and not isinstance(extra_config, Mapping):
        wrong = ConfigError("model_loader_extra_config", f"is a {type(extra_config).__name__}", "a JSON object")
        return ExaminedConfig(Settings(), errors=(wrong,))
    environment = os.environ if environment is None else environment
    ours: dict[str, Any] = {}
    passed_through: dict[str, Any] = {}
    errors: list[ConfigError] = []
    for key, value in (extra_config or {}).items():
        if key in Settings.model_fields:
            ours[key] = value
        elif str(key).lower().startswith(_PREFIX):
            errors.append(_unknown_option(str(key)))
        else:
            passed_through[key] = value
    decided = set(ours).union(_EITHER if set(_EITHER) & set(ours) else ())
    errors += _blank_tokens(ours, decided, environment)
    variables: dict[str, str] = {}
    for name, variable in ENVIRONMENT.items():
        text = environment.get(variable, "")
        if name not in decided and (text.strip() if name == "rfork_token" else text):
            variables[name] = variable
            try:
                ours[name] = _from_text(name, variable, text)
            except ConfigError as error:
                errors.append(error)
    settings, wrong_values = _validated(ours)
    errors += wrong_values or _conflicts(settings)
    return ExaminedConfig(settings, passed_through, tuple(errors), variables)


def _validated(ours: Mapping[str, Any]) -> tuple[Settings, list[ConfigError]]:
    """The settings of the values that are right, and an error for each option with a wrong one."""
    values = {name: each if name == _SEPARATOR else _stripped(each) for name, each in ours.items()}
    try:
        return Settings(**values), []
    except pydantic.ValidationError as error:
        errors: dict[str, ConfigError] = {}
        for each in error.errors(include_url=False, include_context=False, include_input=False):
            name = str(each["loc"][0])
            problem = each["msg"].removeprefix("Value error, ")
            wrong = ConfigError(name, problem[:1].lower() + problem[1:], accepts(name))
            wrong.__cause__ = error
            errors.setdefault(name, wrong)
        return Settings(**{name: each for name, each in values.items() if name not in errors}), list(errors.values())


def _unknown_option(key: str) -> ConfigError:
    """The error for an unknown ``rfork_`` key; suggests the nearest name."""
    known = [name for name in Settings.model_fields if name.startswith(_PREFIX)]
    meant = nearest_option(key)
    problem = "no such option" if meant is None else f"no such option; did you mean {meant}?"
    return ConfigError(key, problem, f"one of {', '.join(known)}")


def nearest_option(key: str) -> str | None:
    """The option that a user probably meant by ``key``; None if nothing resembles it."""
    lower = key.lower()
    if f"{_PREFIX}{lower}" in Settings.model_fields:
        return f"{_PREFIX}{lower}"
    near = difflib.get_close_matches(lower, list(Settings.model_fields), n=1, cutoff=0.8)
    return near[0] if near else None


def _blank_tokens(
    given_here: Mapping[str, Any], decided: Container[str], environment: Mapping[str, str]
) -> Iterator[ConfigError]:
    """Errors for a blank token, such as from an empty Secret, and for a blank name of a token file.

    With one, the seed service would be open to everyone although a token was intended.
    """
    file_variable = ENVIRONMENT["rfork_token_file"]
    named = "" if "rfork_token_file" in decided else environment.get(file_variable, "")
    places = [(name, given_here.get(name)) for name in _EITHER]
    for where, text in (*places, (f"rfork_token_file (from {file_variable})", named)):
        if isinstance(text, str) and text and not text.strip():
            yield ConfigError(where, "is blank", "one line of text; leave it out, or empty, for none")
    variable = ENVIRONMENT["rfork_token"]
    given = environment.get(variable)
    elsewhere = "rfork_token" in decided or named
    if given is not None and not given.strip() and not elsewhere:
        yield ConfigError(f"rfork_token (from {variable})", "is blank", "a token; unset the variable for none")


def _conflicts(settings: Settings) -> Iterator[ConfigError]:
    """Errors for options that are right alone and wrong together."""
    if settings.rfork_token and settings.rfork_token_file:
        yield ConfigError("rfork_token_file", "rfork_token is given as well", "a path, if rfork_token is not set")
    if settings.rfork_tls_key_file and not settings.rfork_tls_cert_file:
        yield ConfigError("rfork_tls_key_file", "there is no rfork_tls_cert_file", "a path beside the certificate's")
    if settings.rfork_seed_tls != "off" and settings.rfork_become_seed and not settings.rfork_tls_cert_file:
        yield ConfigError("rfork_seed_tls", "there is no rfork_tls_cert_file", "off, or a certificate beside it")
    if settings.rfork_seed_tls_client_ca_file and settings.rfork_seed_tls != "require":
        problem = f"rfork_seed_tls is {settings.rfork_seed_tls}, so callers need no certificate"
        yield ConfigError("rfork_seed_tls_client_ca_file", problem, "a path, if rfork_seed_tls is require")


def _from_text(name: str, variable: str, text: str) -> Any:
    """The text of an environment variable, converted to the type of its option."""
    kind = Settings.model_fields[name].annotation
    if kind not in (float, int):
        return text
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{name} (from {variable})", "not a number", accepts(name)) from error


def _stripped(value: Any) -> Any:
    """Strip text: a value from a file or a Secret often ends with a line break."""
    return value.strip() if isinstance(value, str) else value
