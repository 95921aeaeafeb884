"""One question to a planner from the terminal: its address and token, and JSON back.

Token and TLS files come from the environment alone, under the names that a worker's have: a command line is read by
everybody on the machine. Whatever the planner says is shown to a person's terminal, so :func:`shown` lets nothing
through that would steer it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rfork.config import base_url, parse_config
from vllm_rfork.errors import ConfigError, PlannerError
from vllm_rfork.logs.quoting import printable
from vllm_rfork.net.client import Answer, BoundedHttp
from vllm_rfork.net.credentials import Credentials

URL_VARIABLE = "RFORK_SCHEDULER_URL"
TOKEN_VARIABLE = "RFORK_TOKEN"  # noqa: S105 - the variable's name
MAX_BODY_NBYTES = 64 << 20
#: Characters of one cell: the longest seed key, and more.
MAX_CELL = 4096

#: Of a table that goes into a pipe or a file: no line is folded there.
_UNFOLDED_WIDTH = 10_000

_F = TypeVar("_F", bound=Callable[..., Any])


def planner_options(command: _F) -> _F:
    """``--url`` and ``--timeout``, as every command has them that asks the planner."""
    command = click.option(
        "--timeout", "timeout_s", type=click.FloatRange(0.1, 600), default=10.0, show_default=True, help="Seconds."
    )(command)
    return click.option("--url", envvar=URL_VARIABLE, show_envvar=True, help="The planner's base URL.")(command)


def json_option(command: _F) -> _F:
    """``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def checked_url(url: str | None) -> str:
    """``url`` as a base URL.

    Raises:
        click.UsageError: it is missing or not a base URL.
    """
    if not url:
        raise click.UsageError(f"say where the planner is: --url http://host:1223, or {URL_VARIABLE}")
    try:
        return base_url(url)
    except ValueError as error:
        raise click.UsageError(f"the planner's URL is unusable: {error}; it must look like http://host:1223") from error


def credentials() -> Credentials:
    """Token and TLS as a worker with this environment would have them.

    Raises:
        click.UsageError: a variable is wrong, or a file that it names cannot be used.
    """
    try:
        return Credentials.of(parse_config({}).settings)
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
) -> Answer:
    """Ask for ``path``, with the token and the TLS files of the environment where there are any.

    Raises:
        PlannerError: no answer, or none that is HTTP.
        click.UsageError: a variable is wrong, or a file that it names cannot be used.
    """
    http = BoundedHttp("planner", PlannerError, credentials())
    return asyncio.run(
        http.exchange(
            method, url + path, timeout_s=timeout_s, headers=headers, params=params, max_body_nbytes=MAX_BODY_NBYTES
        )
    )


def ask_json(url: str | None, path: str, *, timeout_s: float, params: dict[str, str]) -> dict[str, Any]:
    """The JSON object that ``GET path`` answers.

    Raises:
        click.UsageError: no usable ``url``.
        click.ClickException: no answer, a refusal, or something else than a JSON object; says what to do.
    """
    try:
        answer = ask(checked_url(url), path, timeout_s=timeout_s, params=params)
    except PlannerError as error:
        raise click.ClickException(str(error)) from error
    if answer.status == 401:
        raise click.ClickException(
            f"the planner wants a valid bearer token: set {TOKEN_VARIABLE}, or RFORK_TOKEN_FILE to a file with it"
        )
    if answer.status != 200:
        raise click.ClickException(f"the planner answered {answer}")
    try:
        return msgspec.json.decode(answer.body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise click.ClickException(f"the planner's answer is not a JSON object: {error}") from error


def shown(value: object) -> Text:
    """``value`` as a table's cell: no markup, no control characters, at most ``MAX_CELL`` characters."""
    text = "-" if value is None or value == "" else str(value)
    return Text(printable("".join(each if each.isprintable() else "�" for each in text[: MAX_CELL + 1]), MAX_CELL))


def echo_json(data: object) -> None:
    """Print ``data`` as JSON in ASCII: planners' texts cannot steer the terminal that shows it."""
    click.echo(json.dumps(data, indent=2))


def print_table(table: Table) -> None:
    """Print ``table``, as wide as the terminal. Into a pipe or file: unfolded, and with lines of ASCII only."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_UNFOLDED_WIDTH)
        table.box = box.ASCII
    console.print(table)
