"""The ``vllm-rfork`` command.

One row in :data:`COMMANDS` per command. Its module is imported when the command runs, so that help and shell completion
are fast and need neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import click

from vllm_rfork import __version__


class CommandRow(NamedTuple):
    """A command's target (``module:attribute``) and its line in the list of commands."""

    target: str
    summary: str


COMMANDS: dict[str, CommandRow] = {
    "planner": CommandRow("vllm_rfork.planner.command:planner", "run the planner, which pairs receivers with seeds"),
    "seeds": CommandRow("vllm_rfork.cli.fleet:seeds", "list a planner's seeds"),
    "leases": CommandRow("vllm_rfork.cli.fleet:leases", "list current leases and waiting receivers"),
    "drain": CommandRow("vllm_rfork.cli.operate:drain", "grant a seed to no receiver any more, or undo that"),
    "lift": CommandRow("vllm_rfork.cli.operate:lift", "end the quarantine of a seed"),
    "key": CommandRow("vllm_rfork.cli.key:key", "print a worker's seed key from its parts"),
    "check": CommandRow("vllm_rfork.cli.check:check", "validate a worker's configuration before a start"),
    "explain": CommandRow("vllm_rfork.cli.explain:explain", "explain why a worker pairs with seeds, or does not"),
    "doctor": CommandRow("vllm_rfork.cli.doctor:doctor", "check planner, engines and this machine"),
    "selftest": CommandRow("vllm_rfork.cli.selftest:selftest", "fork random bytes between two processes"),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called ``cmd_name``, imported now."""
        row = COMMANDS.get(cmd_name)
        if row is None:
            return None
        module, _, attribute = row.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, row.summary) for name, row in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vllm-rfork")
def main() -> None:
    """RFork: a starting vLLM worker forks its weights from the memory of a running peer."""


if __name__ == "__main__":
    main()
