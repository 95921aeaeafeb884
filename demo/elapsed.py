"""The elapsed time of a step of the demo, shown while it runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: How often, in seconds: one line that is rewritten in a terminal, a line each elsewhere.
TERMINAL_S, PIPE_S = 1.0, 15.0


@contextmanager
def elapsed(what: str) -> Iterator[None]:
    """Show ``what`` and its elapsed seconds on standard output, from time to time, until the block ends.

    Nothing else may print inside the block.
    """
    terminal = sys.stdout.isatty()
    start = time.monotonic()
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(TERMINAL_S if terminal else PIPE_S):
            line = f"   {what}: {time.monotonic() - start:.0f} s so far"
            print(f"\r{line}" if terminal else line, end="" if terminal else "\n", flush=True)
        if terminal:
            print("\r\x1b[2K", end="", flush=True)  # clear the line

    shows = threading.Thread(target=show, daemon=True)
    shows.start()
    try:
        yield
    finally:
        ended.set()
        shows.join()
