"""``vllm-rfork selftest``: the options and the printed report. The work is in :mod:`vllm_rfork.selftest`."""

from __future__ import annotations

import re
from typing import Any

import click
from click.core import ParameterSource

from vllm_rfork.cli import selftest_hosts
from vllm_rfork.cli.seconds import Seconds
from vllm_rfork.cli.selftest_hosts import Serving
from vllm_rfork.engines.registry import AUTO, ENGINES, engine_order
from vllm_rfork.errors import ConfigError
from vllm_rfork.selftest import local
from vllm_rfork.selftest.report import CODES
from vllm_rfork.selftest.roles import Trial

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_RUN_S, _SERVE_S = 120.0, 600.0


class Size(click.ParamType[int]):
    """A number of bytes with an optional binary unit: ``1000000``, ``256M``, ``2GiB``."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([0-9]{1,15})\s*([kmg]?)(i?b)?", str(value).strip().lower())
        if not found or not int(found[1]):
            self.fail(f"{value!r} is not a size such as 256M or 2GiB", param, ctx)
        return int(found[1]) * _UNITS[found[2]]


@click.command(epilog="Exit status: " + "; ".join(f"{code} {text}" for code, text in CODES.items()) + ".")
@click.option("--engine", "setting", default=AUTO, show_default=True, help="as rfork_engine: a name, a list, or auto")
@click.option("--device", default="cpu", show_default=True, help="torch device of this side: cpu, cuda:0, npu:0")
@click.option("--seed-device", default=None, help="the seed's device, on one machine  [default: the receiver's]")
@click.option("--size", "nbytes", type=Size(), default="256M", show_default=True, help="bytes to fork")
@click.option("--all", "every", is_flag=True, help="try every engine, and compare their speed")
@click.option("--serve", is_flag=True, help="be the seed of a test between two hosts, and print the other's command")
@click.option("--connect", metavar="HOST[:PORT]", default=None, help="be the receiver of a test between two hosts")
@click.option(
    "--host", default=None, help="this host's address  [default: 127.0.0.1; between two hosts, that of the route]"
)
@click.option(
    "--port", type=click.IntRange(1, 65535), default=None, help="port of --serve  [default: 1224, or a free one]"
)
@click.option(
    "--clients", type=click.IntRange(1, 1000), default=16, show_default=True, help="runs that --serve permits"
)
@click.option("--once", is_flag=True, help="the same as --clients 1")
@click.option(
    "--timeout",
    "timeout_s",
    type=Seconds(1, 86_400),
    default=None,
    help=f"bound of the whole run, in seconds  [default: {_RUN_S:g}; with --serve {_SERVE_S:g}]",
)
@click.option("--native-log", is_flag=True, help="show what native libraries log, such as UCX with UCX_LOG_LEVEL=info")
@click.option("--corrupt", is_flag=True, hidden=True, help="alter the seed's memory after its digest was computed")
@click.pass_context
def selftest(ctx: click.Context, /, setting: str, serve: bool, connect: str | None, every: bool, **given: Any) -> None:
    """Fork random bytes from one process to another and compare digests.

    Run this first on new hardware. It starts a seed and a receiver on this machine, transfers the bytes with the
    first engine that works, and prints lane, seconds and GB/s, and the reason for each preferred engine that does not
    work.

    Between two hosts: --serve on one prints the command for the other. Every call needs the token in RFORK_TOKEN or
    RFORK_TOKEN_FILE; without one, --serve generates it.
    """
    serving = Serving(given.pop("port"), given.pop("clients"), once=given.pop("once"))
    _check_together(ctx, serve, connect)
    engines = _engines(setting, given["device"])
    timeout_s = given.pop("timeout_s") or (_SERVE_S if serve else _RUN_S)
    seed_device, host = given.pop("seed_device") or given["device"], given.pop("host")
    trial = Trial(engines[0], seed_device=seed_device, timeout_s=timeout_s, host=host or "127.0.0.1", **given)
    if serve:
        ctx.exit(selftest_hosts.serve(trial, engines, setting, serving, host=host))
    if connect is not None:
        made = selftest_hosts.connect(connect, trial, engines, setting, host=host, every=every)
    else:
        _check_host(host, engines)
        made = local.run(trial, engines, setting=setting, every=every)
    for line in made.lines:
        click.echo(line, err=bool(made.code))
    ctx.exit(made.code)


def _engines(setting: str, device: str) -> tuple[str, ...]:
    """The engines of ``--engine`` in their order. Raises UsageError."""
    try:
        return engine_order(setting, device.partition(":")[0])
    except ConfigError as error:
        raise click.UsageError(f"--engine {setting}: {error.problem}; it accepts {error.accepts}") from error


def _check_together(ctx: click.Context, serve: bool, connect: str | None) -> None:
    """Raise UsageError for an option that the kind of run would ignore."""
    if serve and connect is not None:
        raise click.UsageError("--serve and --connect are for different hosts")
    ignored = {
        "port": None if serve else "without --serve",
        "clients": None if serve else "without --serve",
        "once": None if serve else "without --serve",
        "every": "with --serve" if serve else None,
        "seed_device": "with --serve and --connect" if serve or connect is not None else None,
    }
    for name, when in ignored.items():
        if when is not None and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = {"every": "all", "seed_device": "seed-device"}.get(name, name)
            raise click.UsageError(f"--{option} has no effect {when}")


def _check_host(host: str | None, engines: tuple[str, ...]) -> None:
    """Raise UsageError if ``--host`` was given and the only engine ignores it."""
    if host is not None and len(engines) == 1 and (row := ENGINES.get(engines[0])) and (hint := row.host_hint):
        raise click.UsageError(f"--host has no effect on engine {engines[0]}: {hint}")
