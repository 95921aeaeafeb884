"""The elapsed time of a step of the demo, shown while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

#: Interval between two lines where the output is not a terminal, in seconds.
PIPE_S = 15.0


@contextmanager
def elapsed(what: str, console: Console) -> Iterator[None]:
    """Show ``what`` and its elapsed time until the block ends: a spinner on a terminal, a line from time to time else.

    Nothing else may print inside the block.
    """
    # A console may be forced to treat a pipe as a terminal (FORCE_COLOR), in which a spinner would fill the log.
    with _spinner(what, console) if console.is_interactive and console.file.isatty() else _lines(what, console):
        yield


@contextmanager
def _spinner(what: str, console: Console) -> Iterator[None]:
    columns = (TextColumn("  "), SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def _lines(what: str, console: Console) -> Iterator[None]:
    start = time.monotonic()
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(PIPE_S):
            console.print(f"   {what}: {time.monotonic() - start:.0f} s so far", markup=False)

    shows = threading.Thread(target=show, daemon=True)
    shows.start()
    try:
        yield
    finally:
        ended.set()
        shows.join()
