"""``vllm-rfork check``: validates a worker's configuration before a start, with the code of the start."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from vllm_rfork.cli.planner_api import echo_json, json_option
from vllm_rfork.cli.tables import print_rows
from vllm_rfork.config import ENVIRONMENT, ExaminedConfig, examine_config
from vllm_rfork.config.parsing import nearest_option
from vllm_rfork.engines.registry import check_engines
from vllm_rfork.errors import ConfigError
from vllm_rfork.logs.quoting import counted
from vllm_rfork.net.client import without_credentials
from vllm_rfork.net.credentials import Credentials

OK, NOTE, ERROR = "ok", "note", "error"
_MAX_CONFIG_CHARACTERS = 1 << 20
_SECRET = "rfork_token"  # noqa: S105 - the option's name
_FILES = (
    "rfork_token_file",
    "rfork_tls_ca_file",
    "rfork_tls_cert_file",
    "rfork_tls_key_file",
    "rfork_seed_tls_client_ca_file",
)
_WHOLE = "model_loader_extra_config"


@dataclasses.dataclass(frozen=True)
class Row:
    """The result for one option. ``status`` is ``ok``, ``note`` (may be intended) or ``error``."""

    option: str
    status: str
    text: str


@click.command(epilog="Exit status: 0 without errors; 1 with errors; 2 if there is no such file, or no JSON in it.")
@click.argument("config", required=False)
@click.option("--env", is_flag=True, help="read the environment variables of a worker as well")
@click.option("--files", is_flag=True, help="read the token file and the TLS files as well")
@json_option
@click.pass_context
def check(ctx: click.Context, config: str | None, env: bool, files: bool, as_json: bool) -> None:
    """Validate CONFIG, the JSON object for --model-loader-extra-config.

    CONFIG is the name of a file, - for the standard input, or the JSON text itself. With --env it may be missing.
    """
    if config is None and not env:
        raise click.UsageError("CONFIG is missing; give a file, the JSON text or -, or use --env")
    examined = examine_config({} if config is None else _read(config), os.environ if env else {})
    rows = rows_of(examined, files=files)
    errors = sum(row.status == ERROR for row in rows)
    if as_json:
        echo_json([dataclasses.asdict(row) for row in rows])
    else:
        lines = [(row.option, row.status.upper() if row.status == ERROR else row.status, row.text) for row in rows]
        print_rows(("option", "status", "text"), lines, counted(errors, "error") if errors else "no error")
    ctx.exit(1 if errors else 0)


def _read(config: str) -> Any:
    """The JSON value in a file, on the standard input, or in ``config`` itself. Raises UsageError."""
    where = "CONFIG"
    if config == "-":
        text, where = sys.stdin.read(_MAX_CONFIG_CHARACTERS + 1), "the standard input"
    elif config.lstrip().startswith(("{", "[")):
        text = config
    else:
        where = config
        try:
            with Path(config).open(encoding="utf-8") as file:
                text = file.read(_MAX_CONFIG_CHARACTERS + 1)
        except (OSError, ValueError) as error:
            raise click.UsageError(f"{config} cannot be read: {error}") from error
    if len(text) > _MAX_CONFIG_CHARACTERS:
        raise click.UsageError(f"{where} has more than {_MAX_CONFIG_CHARACTERS} characters")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{where} is not JSON: {error}") from error


def rows_of(examined: ExaminedConfig, *, files: bool) -> list[Row]:
    """One row for each option that is set, is wrong, or is required and missing.

    Args:
        files: read the files that the options name.
    """
    errors = [*examined.errors, *_later_errors(examined, files=files)]
    wrong: dict[str, Row] = {}
    for error in errors:
        row = _wrong(error, examined.variables)
        wrong.setdefault(row.option, row)
    if _WHOLE in wrong:
        return list(wrong.values())
    options = type(examined.settings).model_fields
    right = examined.settings.model_fields_set
    rows = [wrong.get(name) or _right(name, examined, files=files) for name in options if name in {*right, *wrong}]
    rows += [row for name, row in wrong.items() if name not in options]
    rows += [_passed_through(name) for name in examined.passed_through]
    rows += [
        Row(name, ERROR, f"required, not set (or {ENVIRONMENT[name]})")
        for name in examined.settings.missing
        if name not in wrong
    ]
    return rows


def _later_errors(examined: ExaminedConfig, *, files: bool) -> Iterator[ConfigError]:
    """Errors that a start finds after it has parsed the options."""
    try:
        check_engines(examined.settings.rfork_engine)
    except ConfigError as error:
        yield error
    if files and not examined.errors:
        try:
            Credentials.of(examined.settings)
        except ConfigError as error:
            yield error


def _wrong(error: ConfigError, variables: Mapping[str, str]) -> Row:
    option, _, variable = error.field.partition(" (from ")
    variable = variable.rstrip(")") or variables.get(option, "")
    source = f" (from {variable})" if variable else ""
    accepts = "" if error.problem.endswith("?") else f"; it accepts {error.accepts}"
    return Row(option, ERROR, f"{error.problem}{source}{accepts}")


def _right(name: str, examined: ExaminedConfig, *, files: bool) -> Row:
    value = getattr(examined.settings, name)
    if name == _SECRET:
        text = "set" if value else "not set"
    elif name == "rfork_scheduler_url":
        text = ",".join(map(without_credentials, value.split(",")))
    elif name == "model_url":
        text = without_credentials(value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    if name in _FILES and value and not files:
        text += " (not read; --files reads it)"
    if name == "rfork_fallback_load_format" and value != "auto":
        text += " (vLLM checks this name at the start)"
    source = f" (from {examined.variables[name]})" if name in examined.variables else ""
    return Row(name, OK, f"{text}{source}")


def _passed_through(name: str) -> Row:
    """The row of a key that the fallback loader gets. Its value may be a secret."""
    meant = nearest_option(str(name))
    hint = "" if meant is None else f"; did you mean {meant}?"
    return Row(str(name), NOTE, f"not an option of RFork: it is passed to the fallback loader{hint}")
