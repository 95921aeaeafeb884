"""The demo's output: on standard output and, if asked for, in a picture of it."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

#: Characters a line of the picture.
WIDTH = 100


class Screen:
    """Standard output, and a copy as a terminal of :data:`WIDTH` columns would show it.

    Spinners are not in the copy; they print to :attr:`console` alone.
    """

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._copy = Console(
            record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, color_system="truecolor", highlight=False
        )

    def say(self, text: str) -> None:
        """Print a paragraph: on a terminal broken between words, elsewhere one line."""
        self.console.print(text, soft_wrap=not self.console.is_terminal)
        self._copy.print(text)

    def show(self, table: Table) -> None:
        """Print a table, in ASCII where the output is not a terminal."""
        for console in (self.console, self._copy):
            table.box = box.HEAVY_HEAD if console.is_terminal else box.ASCII
            console.print(table)

    def save(self, file: Path, title: str) -> None:
        """Write all that was printed so far to ``file``, as an SVG that loads nothing from elsewhere."""
        svg = self._copy.export_svg(title=title, clear=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")
