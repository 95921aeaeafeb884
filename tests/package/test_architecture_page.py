"""docs/architecture.md names every module and every transition of a load, and nothing else of the kind."""

from __future__ import annotations

import ast
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


def test_the_state_diagram_is_the_table_of_transitions() -> None:
    """Read from the source, since importing it needs vLLM."""
    tree = ast.parse((ROOT / "vllm_rfork" / "load" / "machine.py").read_text())
    assigned = (node for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict))
    (table,) = [node.value for node in assigned if ast.unparse(node.target) == "TRANSITIONS"]
    assert isinstance(table, ast.Dict)
    rows = zip(table.keys, table.values, strict=True)
    transitions = {(phase(key), phase(each)) for key, value in rows for each in ast.walk(value) if phase(each)}
    arrows = re.findall(r"^ *([A-Z]+) --> ([A-Z]+)", PAGE.read_text(), re.MULTILINE)
    assert set(arrows) == transitions
    assert len(arrows) == len(transitions) > 10


def phase(node: ast.expr | ast.AST | None) -> str:
    """The name of a phase in source; empty for anything else."""
    is_phase = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Phase"
    return node.attr if is_phase and isinstance(node, ast.Attribute) else ""
