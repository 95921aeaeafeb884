"""``vllm-rfork selftest``: the options and the printed report. The work is in :mod:`vllm_rfork.selftest`."""

from __future__ import annotations

import re
from typing import Any

import click

from vllm_rfork.engines.registry import ENGINES, engine_names
from vllm_rfork.selftest.processes import CODES, run
from vllm_rfork.selftest.roles import Trial

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


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
@click.option("--engine", type=click.Choice(sorted(engine_names())), required=True, help="transfer engine to test")
@click.option("--device", default="cpu", show_default=True, help="receiver's torch device: cpu, cuda:0, npu:0")
@click.option("--seed-device", default=None, help="seed's device  [default: the receiver's]")
@click.option("--size", "nbytes", type=Size(), default="256M", show_default=True, help="bytes to fork")
@click.option("--host", default=None, help="IPv4 address that the engine listens on  [default: 127.0.0.1]")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(1),
    default=120.0,
    show_default=True,
    help="bound of the whole run, in seconds",
)
@click.option("--corrupt", is_flag=True, hidden=True, help="alter the seed's memory after its digest was computed")
@click.pass_context
def selftest(ctx: click.Context, /, seed_device: str | None, host: str | None, **given: Any) -> None:
    """Fork random bytes from one process to another and compare digests.

    Run this first on new hardware. It starts a seed and a receiver on this machine, transfers the bytes with the
    engine that vLLM would use, and prints seconds and GB/s.
    """
    if host is not None and (row := ENGINES.get(given["engine"])) and (hint := row.host_hint):
        raise click.UsageError(f"--host has no effect on engine {given['engine']}: {hint}")
    report = run(Trial(seed_device=seed_device or given["device"], host=host or "127.0.0.1", **given))
    for line in report.lines:
        click.echo(line, err=bool(report.code))
    ctx.exit(report.code)
