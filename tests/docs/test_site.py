"""The site has every page, and links that are right in the repository are right on the site; `make docs` builds it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.docs_hooks import INCLUDED, on_page_markdown
from scripts.pictures import PICTURES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


@dataclass
class File:
    src_uri: str


@dataclass
class Page:
    file: File
    meta: dict[str, Any] = field(default_factory=dict)


def named(nav: object) -> list[str]:
    """The pages in a part of the navigation."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    assert not isinstance(parts, bytes)
    return [page for part in parts for page in named(part)]  # type: ignore[attr-defined]


def test_the_navigation_has_every_page_once() -> None:
    pages = [str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if not page.name.endswith(".zh.md")]
    assert sorted(named(CONFIG["nav"])) == sorted(pages)


def test_warnings_are_errors_and_the_site_works_offline() -> None:
    assert CONFIG["strict"] is True
    assert set(CONFIG["validation"]["links"].values()) == {"warn"}
    assert CONFIG["theme"]["font"] is False
    assert "extra_javascript" not in CONFIG
    assert all((DOCS / name).exists() for name in CONFIG["extra_css"])


@pytest.mark.parametrize("name", [name for name in INCLUDED if (ROOT / name).exists()])
def test_files_of_the_root_are_pages_of_the_site(name: str) -> None:
    page = DOCS / INCLUDED[name].replace(".md", ".zh.md" if ".zh-CN" in name else ".md")
    text = page.read_text(encoding="utf-8")
    assert f"include: {name}\n" in text
    assert f"](../{name})" in text, "readers of the repository get a link"


def on_the_site(markdown: str, page: str = "planner.md") -> str:
    return on_page_markdown(markdown, page=Page(File(page)))


def test_links_between_pages_stay() -> None:
    same = "[a](protocol.md#heartbeat), [b](#tls), [c](https://example.org/a.md), ![d](assets/fork.svg)"
    assert on_the_site(same) == same


def test_links_to_files_of_the_root_lead_to_their_pages() -> None:
    assert on_the_site("[a](../SECURITY.md#caches)") == "[a](security.md#caches)"
    assert on_the_site("[a](../../README.md)", "quick-start/cpu.md") == "[a](../index.md)"


def test_links_to_files_that_are_not_pages_become_text() -> None:
    assert on_the_site("see [`deploy/images`](../deploy/images), then") == "see `deploy/images`, then"


def test_links_of_an_included_file_start_at_the_root() -> None:
    page = Page(File("security.md"), {"include": "SECURITY.md"})
    text = on_page_markdown("in the repository", page=page)
    assert text.startswith("# Security\n")
    assert "](planner.md#tls)" in text
    assert "](docs/" not in text


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_site_has_a_menu_instead_of_links_between_languages(name: str) -> None:
    text = on_page_markdown("in the repository", page=Page(File("index.md"), {"include": name}))
    assert text.startswith("# vllm-rfork\n\n[vLLM]") or text.startswith("# vllm-rfork\n\nA plugin")


def test_links_of_translations_name_the_english_file() -> None:
    assert on_the_site("[a](../options.zh.md)", "quick-start/cpu.zh.md") == "[a](../options.md)"


def test_code_is_left_alone() -> None:
    code = "```\n[a](../SECURITY.md)\n```\n"
    assert on_the_site(code) == code


def test_the_readme_fits_a_screen() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 70


@pytest.mark.parametrize("name", list(PICTURES))
def test_pictures_are_what_the_script_draws(name: str) -> None:
    assert (DOCS / "assets" / f"{name}.svg").read_text(encoding="utf-8") == PICTURES[name](), (
        "python -m scripts.pictures"
    )
