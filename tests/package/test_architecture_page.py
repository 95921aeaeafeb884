"""The page on the architecture names every module, and no module that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"


def test_the_list_of_modules_is_complete_and_true() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    modules = [line.split("|")[1] for line in rows if ".py`" in line.split("|")[1] or "/`" in line.split("|")[1]]
    listed = {name for cell in modules for name in re.findall(r"`([^`]+)`", cell)}

    there = {path.name for path in (ROOT / "vllm_rfork").glob("*.py")} - {"__init__.py"}
    there |= {f"{path.parent.name}/" for path in (ROOT / "vllm_rfork").glob("*/__init__.py")}
    assert listed == there
