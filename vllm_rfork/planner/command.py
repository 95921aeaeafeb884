"""``vllm-rfork planner``: one flag and one environment variable for every setting.

Imports nothing heavy before it runs.
"""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from vllm_rfork.errors import ConfigError
from vllm_rfork.planner.settings import ENVIRONMENT_PREFIX, Settings, check_environment, settings_from


def _options(command: click.Command) -> click.Command:
    """Add an option to ``command`` for every field of :class:`Settings`."""
    for name, field in Settings.model_fields.items():
        default = None if field.default is None else str(field.default)
        command.params.append(
            click.Option(
                [f"--{name.replace('_', '-')}"],
                is_flag=field.annotation is bool,
                default=False if field.annotation is bool else None,
                envvar=ENVIRONMENT_PREFIX + name.upper(),
                show_envvar=True,
                help=(field.description or "") + (f"  [default: {default}]" if default else ""),
                metavar=None if field.annotation is bool else "VALUE",
            )
        )
    return command


def _source(context: click.Context, name: str) -> str:
    """Return the flag or variable that set ``name``."""
    if context.get_parameter_source(name) is ParameterSource.ENVIRONMENT:
        return ENVIRONMENT_PREFIX + name.upper()
    return f"--{name.replace('_', '-')}"


@click.command(
    "planner",
    epilog="Exit status: 0 after SIGTERM or SIGINT; 1 it could not start (port in use, no store); 2 wrong settings.",
)
@click.pass_context
def planner(context: click.Context, /, **given: Any) -> None:
    """Run the planner: the service that pairs receivers with seeds.

    A bearer token comes from --token-file, or from RFORK_TOKEN and, during a rotation, RFORK_TOKEN_PREVIOUS.
    """
    import os

    from vllm_rfork.planner import app, logs
    from vllm_rfork.planner.store.errors import StoreError

    try:
        check_environment(os.environ)
        values = {name: value for name, value in given.items() if value is not None}
        settings = settings_from(values, {name: _source(context, name) for name in values})
        logs.set_up(settings.log_format, settings.log_level)
        app.run(settings)
    except ConfigError as error:
        raise click.UsageError(str(error), context) from error
    except (OSError, StoreError) as error:
        raise click.ClickException(f"the planner could not start: {error}") from error


_options(planner)
