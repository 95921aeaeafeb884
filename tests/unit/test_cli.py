"""The command stays light, and every line of its table leads to a command."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from vllm_rfork.cli.main import COMMANDS, main

HEAVY = ("torch", "vllm", "nixl_cu13", "yr", "transformers")


def modules_after(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return set(done.stdout.split())


def test_importing_the_command_line_pulls_in_nothing_heavy() -> None:
    imported = modules_after("import vllm_rfork.cli.main")
    assert "click" in imported
    assert imported.isdisjoint(HEAVY)
    assert not any(name.startswith("vllm_rfork.") for name in imported - {"vllm_rfork.cli", "vllm_rfork.cli.main"})


def test_every_command_imports_without_torch_and_vllm() -> None:
    """All of them in one process: that takes a second instead of ten."""
    modules = {row.target.partition(":")[0] for row in COMMANDS.values()}
    imported = modules_after(f"import {', '.join(sorted(modules))}")
    assert modules <= imported
    assert imported.isdisjoint(HEAVY)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    assert isinstance(main.get_command(click.Context(main), name), click.Command)  # type: ignore[attr-defined]
    done = CliRunner().invoke(main, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert "Usage" in done.output
    assert "Exit status" in done.output


def test_the_list_of_commands_is_the_table() -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0
    for name, row in COMMANDS.items():
        assert name in done.output
        assert row.summary.split()[0] in done.output


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["explode"]).exit_code == 2
