"""Rows for people on a terminal, and plain columns in a pipe or a file.

In a pipe: one header line, one line a row, tabs between the columns; no border, no colour, and nothing is folded or
cut off, except a cell of more than :data:`MAX_CELL` characters. Titles and sums go to the standard error stream then:
``cut`` and ``awk`` read rows only.

Text from a planner goes to a terminal, so :func:`shown` removes what could control it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_rfork.logs.quoting import printable

#: Characters of one cell; a seed key has at most 2048.
MAX_CELL = 4096
#: Colours of the words that begin a row.
STYLES = {
    **dict.fromkeys(("ok", "pairs"), "green"),
    **dict.fromkeys(("note", "equal", "unknown"), "yellow"),
    **dict.fromkeys(("fail", "ERROR", "differs"), "bold red"),
}
#: Smallest width of the first of aligned columns, so that lines printed by several calls have one alignment.
_FIRST_WIDTH = 11


def on_terminal() -> bool:
    """Return True if the standard output is a terminal."""
    return sys.stdout.isatty()


def shown(value: object) -> Text:
    """``value`` as a table's cell: no markup, no control characters, at most ``MAX_CELL`` characters."""
    text = "-" if value is None or value == "" else str(value)
    return Text(printable("".join(each if each.isprintable() else "�" for each in text[: MAX_CELL + 1]), MAX_CELL))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> None:
    """Print ``rows`` as a table with borders, as wide as the terminal; in a pipe as plain columns."""
    if not on_terminal():
        _print_plain([columns, *rows])
        if title:
            click.echo(title, err=True)
        return
    table = Table(title=title or None, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(_styled, row))
    Console().print(table)


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[object]], summary: str) -> None:
    """Print ``rows`` as :func:`print_lines`, with ``summary`` below; in a pipe as :func:`print_table`."""
    if on_terminal():
        print_lines(rows)
        click.echo(summary)
    else:
        print_table(columns, rows, title=summary)


def print_lines(rows: Sequence[Sequence[object]]) -> None:
    """Print ``rows`` aligned, without borders and names of columns; in a pipe with tabs.

    The last column is folded at the width of the terminal, below itself.
    """
    if not on_terminal():
        _print_plain(rows)
        return
    if not rows:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    count = max(map(len, rows))
    for place in range(count):
        last = place == count - 1
        width = _FIRST_WIDTH if place == 0 else None
        table.add_column(overflow="fold", no_wrap=not last, min_width=width, ratio=1 if last else None)
    for row in rows:
        table.add_row(*map(_styled, row))
    Console().print(table)


def _print_plain(rows: Iterable[Sequence[object]]) -> None:
    for row in rows:
        click.echo("\t".join(shown(each).plain for each in row))


def _styled(value: object) -> Text:
    text = shown(value)
    if style := STYLES.get(text.plain):
        text.stylize(style)
    return text
