"""Calls of the command line to a planner: its URL, token and TLS files, and what is printed of its answers.

Token and TLS files come from the environment only, from the same variables as a worker's: every user of a machine can
read its command lines.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from vllm_rfork.cli.seconds import Seconds
from vllm_rfork.clients.answers import json_object
from vllm_rfork.clients.calls import MAX_JSON_NBYTES, PlannerCalls
from vllm_rfork.config import Settings, parse_config, planner_urls
from vllm_rfork.errors import ConfigError, PlannerError
from vllm_rfork.net.client import Answer
from vllm_rfork.net.credentials import Credentials

URL_VARIABLE = "RFORK_SCHEDULER_URL"
TOKEN_VARIABLE = "RFORK_TOKEN"  # noqa: S105 - the variable's name

_F = TypeVar("_F", bound=Callable[..., Any])


def planner_options(command: _F) -> _F:
    """``--url`` and ``--timeout``."""
    command = click.option(
        "--timeout",
        "timeout_s",
        type=Seconds(0.1, 600),
        default=10.0,
        show_default=True,
        help="bound of one call, in seconds",
    )(command)
    text = "base URL of the planner; several replicas: with commas between"
    return click.option("--url", envvar=URL_VARIABLE, show_envvar=True, help=text)(command)


def json_option(command: _F) -> _F:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="print JSON, for programs")(command)


def checked_url(url: str | None) -> str:
    """``url`` as workers accept it.

    Raises:
        click.UsageError: it is missing or unusable.
    """
    if not url:
        raise click.UsageError(f"no planner is given; use --url http://host:1223, or set {URL_VARIABLE}")
    try:
        return planner_urls(url)
    except ValueError as error:
        raise click.UsageError(f"the planner's URL is unusable: {error}; it must look like http://host:1223") from error


def credentials(*, with_token: bool = True) -> Credentials:
    """Token and TLS of a worker with this environment.

    Args:
        with_token: False leaves the token out, and does not read its file.

    Raises:
        click.UsageError: a variable is wrong, or a file that it names cannot be used.
    """
    try:
        settings: Settings = parse_config({}).settings
        if not with_token:
            settings = settings.model_copy(update={"rfork_token": "", "rfork_token_file": ""})
        return Credentials.of(settings)
    except ConfigError as error:
        raise click.UsageError(str(error)) from error


def ask(
    url: str,
    path: str,
    *,
    timeout_s: float,
    method: str = "GET",
    params: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
    with_token: bool = True,
) -> Answer:
    """The planner's answer to one call, with the environment's TLS files and, unless it is left out, its token.

    Raises:
        PlannerError: no HTTP answer in time from any of the URLs.
        click.UsageError: a variable is wrong, or a file that it names cannot be used.
    """
    planner = PlannerCalls(url, request_timeout_s=timeout_s, credentials=credentials(with_token=with_token))
    return asyncio.run(planner.call(method, path, headers or {}, params=params, max_body_nbytes=MAX_JSON_NBYTES))


def ask_json(
    url: str | None,
    path: str,
    *,
    timeout_s: float,
    method: str = "GET",
    params: dict[str, str] | None = None,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON object in the planner's answer to one call.

    Raises:
        click.UsageError: no usable ``url``.
        click.ClickException: no answer, a refusal, or something other than a JSON object.
    """
    try:
        answer = ask(checked_url(url), path, timeout_s=timeout_s, method=method, params=params, headers=headers)
    except PlannerError as error:
        raise click.ClickException(str(error)) from error
    if answer.status == 401:
        raise click.ClickException(
            f"the planner requires a valid bearer token: set {TOKEN_VARIABLE}, or RFORK_TOKEN_FILE to a file with it"
        )
    try:
        return json_object(answer)
    except PlannerError as error:
        raise click.ClickException(str(error)) from error


def echo_json(data: object) -> None:
    """Print ``data`` as JSON in ASCII: text from planners cannot control the terminal."""
    click.echo(json.dumps(data, indent=2))
