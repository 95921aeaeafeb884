"""Links between the pages lead somewhere, and the files that they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.docs_hooks import anchor

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: Pages that name files of vLLM-Ascend, and the one about the past.
OTHER_SOURCES = {"ascend.md", "interop.md", "CHANGELOG.md"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {anchor(heading) for heading in headings}


@each_page
def test_every_link_leads_to_a_page_and_a_heading(page: Path) -> None:
    for target, place in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not place or place in anchors(there), f"{target}#{place}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in OTHER_SOURCES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|json|yaml|txt|toml))`", page.read_text(encoding="utf-8"))
    named = [name for name in named if not name.startswith("build/")]
    bases = (ROOT, ROOT / "docs", *(ROOT / "vllm_rfork" / part for part in ("", "vllm_compat", "planner")))
    assert [name for name in named if not any((base / name).exists() for base in bases)] == []
