"""Every failure of an engine says whose it was: the planner counts a receiver's own failures against no seed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vllm_rfork"
#: Operations on this process alone: without a statement they count as the receiver's.
OWN = frozenset({"open", "register", "close"})
RAISERS = [path for path in sorted(PACKAGE.rglob("*.py")) if "EngineError(" in path.read_text()]


def unstated(source: str) -> list[int]:
    """Lines that make an EngineError which may involve a peer, and do not say whose failure it is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "EngineError"):
            continue
        operation = node.args[1] if len(node.args) > 1 else None
        own = isinstance(operation, ast.Constant) and operation.value in OWN
        if not own and "side" not in {keyword.arg for keyword in node.keywords}:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", RAISERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_whoever_makes_an_engine_error_about_a_peer_states_the_side(path: Path) -> None:
    assert unstated(path.read_text()) == []


def test_a_missing_side_is_found() -> None:
    assert len(RAISERS) > 8
    assert unstated('raise EngineError(NAME, "read", "no")') == [1]
    assert unstated('raise EngineError(NAME, operation, "no")') == [1]
    assert unstated('raise EngineError(NAME, "register", "no")') == []
