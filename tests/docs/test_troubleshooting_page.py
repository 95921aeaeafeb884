"""docs/troubleshooting.md has every WARNING and ERROR of worker and planner, and no line that the code lacks."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_rfork import messages
from vllm_rfork.messages.causes import CAUSES
from vllm_rfork.planner.app import _LOGGED

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "vllm_rfork"
#: Commands print to a terminal, and the suite of contracts is for authors of engines.
COMMANDS = ("cli", "testing", "selftest")
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in COMMANDS]
#: Added to a line that is written once a minute.
SELDOM = " ( more of these since the last line)"
PAGE = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
TREES = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
#: A line is recognized by a part of this length at least, and by at most the beginning of it.
ENOUGH, BEGINNING = 11, 60


def literals(template: str) -> list[str]:
    """The beginnings of the parts of a log text that do not vary, if they are long enough to recognize it."""
    parts = re.split(r"%(?:\.\d+)?[a-z]|…", template)
    texts = [" ".join(part.strip(" :;,.()").split()) for part in parts]
    return [text[:BEGINNING] for text in texts if len(text) >= ENOUGH]


def logged(tree: ast.AST) -> Iterator[str]:
    """The constant texts of the WARNINGs and ERRORs of a module, with their placeholders."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in {"warning", "error", "exception", "critical"}:
            continue
        owner = ast.unparse(node.func.value).lower()
        # Lines that are written once a minute have the name of their kind before the text.
        texts = node.args[1:2] if "seldom" in owner else node.args[:1]
        if "log" in owner or "seldom" in owner:
            yield "".join(each.value for text in texts for each in ast.walk(text) if isinstance(each, ast.Constant))


LINES = sorted({text for tree in TREES for text in logged(tree) if literals(text)} - {SELDOM})
LINES += sorted(text for level, text in _LOGGED.values() if level >= logging.WARNING)


def test_the_lines_are_found() -> None:
    assert len(LINES) > 60


@pytest.mark.parametrize("text", LINES)
def test_every_warning_is_on_the_page(text: str) -> None:
    assert any(part in PAGE for part in literals(text)), f"describe it on docs/troubleshooting.md: {text}"


def test_every_line_on_the_page_is_the_codes() -> None:
    nodes = [node.value for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    constants = " ".join(" ".join(text.split()) for text in nodes if isinstance(text, str))
    cells = re.findall(r"\| (?:WARNING|ERROR) (`[^|]*) \|", PAGE)
    quoted = [line for cell in cells for line in re.findall("`([^`]+)`", cell) if literals(line)]
    assert len(quoted) > 50
    assert [line for line in quoted if not any(part in constants for part in literals(line))] == []


def test_every_cause_and_every_reason_is_explained() -> None:
    for name in (*CAUSES, *messages.MISSES):
        assert f"`{name}`" in PAGE, name
