"""Docs, docstrings, comments and messages avoid phrases that have to be read twice; CONTRIBUTING.md has the rules."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})

#: Pattern → what to write instead. One word per concept, machines that send instead of speaking, no riddles.
PATTERNS = {
    r"(?<!there )\b(?:is|are|was|were|be|becomes?) no (?!more\b|longer\b)\w+": "is not a …, has no …",
    r"\bvouch\w*": "publish, suspended",
    r"\bbefalls?\b": "happens to",
    r"\bbe it\b": "whether … or …",
    r"\bso many\b": "the number",
    r"\binstalled base\b": "legacy",
    r"\bof another make\b": "third-party",
    r"\bhe(?:ars?|ard) (?:of|from)\b": "receives",
    r"\bspeaks? (?:https?|the protocol)\b": "serves, implements",
    r"\b(?:is|are|was|were|been) told\b": "receives, is notified",
    r"\bbears?\b": "accepts, carries",
    r"\bput aside\b": "quarantined",
    r"\bgives? out\b": "returns",
    r"\bnobody listens\b": "connection refused",
    r"\bof ours\b": "name the project",
    r"\bwhoever\b": "who, a caller that",
    r"\banew\b": "again",
    r"\bare its word\b|\bby (?:its|their) \w+' word\b": "reported by",
    r"\bempty where\b": "Optional, or an exception",
}
#: Folders whose docstrings, comments and messages are held to the same patterns.
SOURCES = sorted(
    path
    for folder in ("bench", "demo", "examples", "scripts", "versions", "vllm_rfork")
    for path in (ROOT / folder).rglob("*.py")
)
#: Begins a docstring that asks instead of naming what the thing is or does.
QUESTION = re.compile(r"(?:What|Whether|How|Why|Where|Who)\b")


def prose(text: str) -> str:
    """``text`` without code, without tables that runs have written, and without the glossary's words to avoid."""
    text = re.sub(r"<!-- begin (.+?) -->.*?<!-- end \1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\|[^|\n]*\|$", "", text, flags=re.MULTILINE) if text.startswith("# Glossary") else text
    return re.sub(r"`[^`\n]+`|\"[^\"\n]+\"", "…", text)


def test_pages_are_written_in_plain_english() -> None:
    found = {page.relative_to(ROOT): complaints(prose(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert [f"{page}: {each}" for page, each_of in found.items() for each in each_of] == []


def complaints(text: str) -> list[str]:
    """Each phrase of ``text`` that a pattern finds, with its surroundings and a better one."""
    text = " ".join(text.split())
    return [
        f"{match[0]!r} in {text[max(0, match.start() - 30) : match.end() + 30]!r}: write {instead}"
        for pattern, instead in PATTERNS.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]


def test_sources_are_written_in_plain_english() -> None:
    assert [f"{source.relative_to(ROOT)}: {each}" for source in SOURCES for each in faults(source)] == []


def faults(source: Path) -> list[str]:
    """What is wrong with the docstrings, comments and messages of one file, one line each."""
    found = [f"line {line}: {each}" for line, text in texts(source) for each in complaints(text)]
    tree = ast.parse(source.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return found + [
        f"write a noun phrase or an imperative: {text.splitlines()[0]}" for text in docstrings if QUESTION.match(text)
    ]


def texts(source: Path) -> Iterator[tuple[int, str]]:
    """Comments, and strings of more than one word without their code, with their line numbers."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, re.sub(r"``.*?``", "…", node.value, flags=re.DOTALL)
    with source.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string


@pytest.mark.parametrize(
    "sentence",
    ["This worker is no seed.", "A seed vouches for its bytes.", "The planner is told of it.", "Read by whoever can."],
)
def test_the_patterns_find_what_they_are_for(sentence: str) -> None:
    assert any(re.search(pattern, sentence, re.IGNORECASE) for pattern in PATTERNS)
