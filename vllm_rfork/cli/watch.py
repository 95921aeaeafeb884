"""A view that is repeated until Ctrl-C: redrawn on a terminal, appended in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import click

from vllm_rfork.cli.tables import on_terminal

_T = TypeVar("_T")


def watch(
    fetch: Callable[[], _T],
    show: Callable[[_T], None],
    every_s: float,
    *,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """Fetch and show again and again, with pauses of ``every_s`` seconds; returns at Ctrl-C.

    A failed call is shown in place of the view: a planner that restarts must not end the command. In a pipe a blank
    line follows each view.
    """
    try:
        while True:
            _once(fetch, show, every_s)
            sleep(every_s)
    except KeyboardInterrupt:
        return


def _once(fetch: Callable[[], _T], show: Callable[[_T], None], every_s: float) -> None:
    found: _T | None = None
    problem = ""
    try:
        found = fetch()
    except click.UsageError:
        raise
    except click.ClickException as error:
        problem = f"Error: {error.message}"
    if on_terminal():
        click.clear()
        click.echo(f"{time.strftime('%H:%M:%S')}, every {every_s:g} s; Ctrl-C ends")
    if found is None:
        click.echo(problem, err=True)
    else:
        show(found)
    if not on_terminal():
        click.echo()
