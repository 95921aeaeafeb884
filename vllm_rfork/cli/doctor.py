"""``vllm-rfork doctor``: checks of the planner, the engines and this machine, with advice.

It changes nothing and transfers no weights; ``vllm-rfork selftest`` does that.
"""

from __future__ import annotations

import dataclasses
import os

import click

from vllm_rfork.cli import doctor_checks, doctor_engines, doctor_machine, doctor_planner, doctor_versions
from vllm_rfork.cli.announcing import announced_address
from vllm_rfork.cli.engine_probe import Lane
from vllm_rfork.cli.findings import FAIL, NOTE, OK, Check, Finding, find_all
from vllm_rfork.cli.machine import Machine
from vllm_rfork.cli.planner_api import echo_json, json_option, planner_options
from vllm_rfork.cli.tables import on_terminal, print_table
from vllm_rfork.engines.registry import engine_names


@click.command(epilog="Exit status: 0 if no check failed, else 1.")
@planner_options
@click.option("--role", type=click.Choice(["worker", "planner"]), help="check what this host needs for that role")
@click.option("--engine", type=click.Choice(engine_names()), help="engine that must work here")
@json_option
@click.pass_context
def doctor(  # noqa: PLR0917 - click passes them by name
    ctx: click.Context, url: str | None, timeout_s: float, role: str | None, engine: str | None, as_json: bool
) -> None:
    """Check planner, engines and this machine, with advice.

    With --engine, that engine must work. Without it, one engine must work if vLLM is installed here; a host without
    vLLM, such as a planner's, needs none.

    With --role worker, vLLM must be installed, and the versions of vLLM and torch, the plugin and the CUDA wheels are
    checked as well. With --role planner: settings, token, TLS files, store and port of a planner with this environment,
    and no engine.
    """
    if role == "planner" and engine is not None:
        raise click.UsageError("--engine is for workers: a planner has no engine")
    found = examine_planner(url, timeout_s) if role == "planner" else examine(url, timeout_s, engine, role=role)
    if as_json:
        echo_json([dataclasses.asdict(each) for each in found])
    else:
        _print(found)
    ctx.exit(1 if any(each.state == FAIL for each in found) else 0)


def examine_planner(url: str | None, timeout_s: float) -> list[Finding]:
    """All findings about the host of a planner, and about the planner at ``url`` if there is one."""
    return [*doctor_planner.findings(os.environ), *(doctor_checks.planner(url, timeout_s) if url else [])]


def examine(url: str | None, timeout_s: float, wanted: str | None, *, role: str | None = None) -> list[Finding]:
    """All findings about the host of a worker, in the order in which a fork depends on them."""
    machine = Machine()
    device_types = machine.device_types()
    lanes: dict[str, list[Lane]] = {}
    packages = find_all(doctor_versions.checks()) if role == "worker" else []
    engines = _engines(wanted, device_types, lanes)
    attach, *others = find_all(
        [
            Check("cross-memory attach", doctor_checks.cross_memory_attach, 45.0),
            Check("libunwind8", lambda: doctor_checks.libunwind(wanted=wanted == "yuanrong")),
            *doctor_machine.checks(machine),
        ]
    )
    return [
        *doctor_checks.planner(url, timeout_s),
        *announced_address(url, timeout_s),
        *packages,
        *engines,
        attach,
        *others,
        *doctor_engines.lanes(
            lanes, device_types, attach=attach.state == OK, expandable=machine.expandable_segments() is not None
        ),
    ]


def _engines(wanted: str | None, device_types: list[str], lanes: dict[str, list[Lane]]) -> list[Finding]:
    """The findings about the engines; adds to ``lanes`` those that each engine has from here."""

    def check(name: str) -> Check:
        def find() -> Finding:
            examined = doctor_engines.engine(name, wanted=name == wanted, device_types=device_types)
            lanes[name] = examined.lanes
            return examined.finding

        lanes[name] = []
        return Check(f"engine {name}", find, doctor_engines.BOUND_S + 5.0)

    found = find_all([check(name) for name in doctor_engines.names(wanted)])
    if wanted is not None or any(each.state == OK for each in found):
        return found
    if doctor_checks.is_worker_host():
        return [dataclasses.replace(each, state=FAIL) for each in found]
    advice = "nothing to do on a planner's host; a worker needs one engine, and vLLM"
    return [dataclasses.replace(each, state=NOTE, advice=advice) for each in found]


def _print(found: list[Finding]) -> None:
    """Two tables: the checks, and the lanes that follow from them."""
    lanes = [each for each in found if each.check.startswith(doctor_engines.LANE)]
    _print_part("", [each for each in found if each not in lanes])
    if lanes:
        click.echo()
        _print_part("Lanes of rfork_engine=auto, to a peer with the hardware and the settings of this host", lanes)
    failed = [each.check for each in found if each.state == FAIL]
    click.echo(f"failed: {', '.join(failed)}" if failed else "no check failed", err=not on_terminal())


def _print_part(title: str, found: list[Finding]) -> None:
    advises = any(each.advice for each in found)
    rows = [(each.state, each.check, each.found, *([each.advice] if advises else [])) for each in found]
    print_table(("state", "check", "result", *(["advice"] if advises else [])), rows, title=title)
