"""``vllm-rfork doctor``: checks of the planner, the engines and this machine, with advice.

It changes nothing and transfers no weights; ``vllm-rfork selftest`` does that.
"""

from __future__ import annotations

import dataclasses

import click
from rich.table import Table

from vllm_rfork.cli import doctor_checks
from vllm_rfork.cli.announcing import announced_address
from vllm_rfork.cli.doctor_checks import FAIL, NOTE, OK, Finding
from vllm_rfork.cli.planner_api import echo_json, json_option, planner_options, print_table, shown
from vllm_rfork.engines.registry import DEFAULT_ENGINE, engine_names

_STYLES = {OK: "green", NOTE: "yellow", FAIL: "bold red"}


@click.command(epilog="Exit status: 0 if no check failed, else 1.")
@planner_options
@click.option("--engine", type=click.Choice(engine_names()), help="engine that must work here")
@json_option
@click.pass_context
def doctor(ctx: click.Context, url: str | None, timeout_s: float, engine: str | None, as_json: bool) -> None:
    """Check planner, engines and this machine, with advice.

    With --engine, that engine must work. Without it, one engine must work if vLLM is installed here; a host without
    vLLM, such as a planner's, needs none.
    """
    found = examine(url, timeout_s, engine)
    if as_json:
        echo_json([dataclasses.asdict(each) for each in found])
    else:
        _print(found)
    ctx.exit(1 if any(each.state == FAIL for each in found) else 0)


def examine(url: str | None, timeout_s: float, wanted: str | None) -> list[Finding]:
    """All findings, in the order in which a fork depends on them."""
    names = dict.fromkeys([*DEFAULT_ENGINE.values(), *([wanted] if wanted else [])])
    engines = [doctor_checks.engine(name, wanted=name == wanted) for name in names]
    if wanted is None and not any(each.state == OK for each in engines):
        if doctor_checks.is_worker_host():
            engines = [dataclasses.replace(each, state=FAIL) for each in engines]
        else:
            advice = "nothing to do on a planner's host; a worker needs one engine, and vLLM"
            engines = [dataclasses.replace(each, state=NOTE, advice=advice) for each in engines]
    return [
        *doctor_checks.planner(url, timeout_s),
        *announced_address(url, timeout_s),
        *engines,
        doctor_checks.libunwind(wanted=wanted == "yuanrong"),
        doctor_checks.cross_memory_attach(),
    ]


def _print(found: list[Finding]) -> None:
    table = Table()
    for name in ("", "check", "result", "advice"):
        table.add_column(name, overflow="fold")
    for each in found:
        mark = shown(each.state)
        mark.stylize(_STYLES[each.state])
        table.add_row(mark, shown(each.check), shown(each.found), shown(each.advice))
    print_table(table)
