"""The docs avoid the phrases that readers have to read twice; CONTRIBUTING.md has the rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "planner.md"})

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
    r"\bof ours\b|\btheirs\b": "name the project",
    r"\bwhoever\b": "who, a caller that",
    r"\banew\b": "again",
    r"\bare its word\b|\bby (?:its|their) \w+' word\b": "reported by",
    r"\bempty where\b": "Optional, or an exception",
}


def prose(text: str) -> str:
    """``text`` without code, without tables that runs have written, and without the glossary's words to avoid."""
    text = re.sub(r"<!-- begin (.+?) -->.*?<!-- end \1 -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\|[^|\n]*\|$", "", text, flags=re.MULTILINE) if text.startswith("# Glossary") else text
    return re.sub(r"`[^`\n]+`|\"[^\"\n]+\"", "…", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_written_in_plain_english(page: Path) -> None:
    text = " ".join(prose(page.read_text(encoding="utf-8")).split())
    found = {
        f"{match[0]!r} in {text[max(0, match.start() - 30) : match.end() + 30]!r}: write {instead}"
        for pattern, instead in PATTERNS.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    }
    assert found == set()


@pytest.mark.parametrize(
    "sentence",
    ["This worker is no seed.", "A seed vouches for its bytes.", "The planner is told of it.", "Read by whoever can."],
)
def test_the_patterns_find_what_they_are_for(sentence: str) -> None:
    assert any(re.search(pattern, sentence, re.IGNORECASE) for pattern in PATTERNS)
