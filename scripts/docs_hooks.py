"""Hooks of MkDocs: pages that are files of the repository's root, and links that leave the folder ``docs``.

The pages are written to be read in the repository as well. There a link such as ``../SECURITY.md`` is right; on the
site that file is a page of its own, and files that are not pages have no address.
"""

from __future__ import annotations

import os.path
import posixpath
import re
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
#: Files of the repository's root → the pages that include them.
INCLUDED = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "RELEASING.md": "releasing.md",
}
#: A link or an image with a relative target: its text, the target, and the anchor with its ``#``.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
#: The line that leads to a page in another language; the site has a menu for that.
LANGUAGES = re.compile(r"^\[(?:English|简体中文)\]\(\S+\)\n\n", re.MULTILINE)
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


class _File(Protocol):
    src_uri: str


class _Page(Protocol):
    file: _File
    meta: dict[str, Any]


class _Config(Protocol):
    mdx_configs: dict[str, dict[str, Any]]


def on_config(config: _Config) -> None:
    """Give headings the anchors that they have in the repository."""
    config.mdx_configs["toc"]["slugify"] = anchor


def anchor(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def on_page_markdown(markdown: str, *, page: _Page, **_: object) -> str:
    """The text of a page as the site needs it: included, with links that resolve on the site.

    A page with ``include: FILE`` in its front matter is that file of the repository's root. In the repository the page
    itself only has a link to the file.
    """
    here = posixpath.join("docs", page.file.src_uri)
    if name := page.meta.get("include"):
        markdown, here = LANGUAGES.sub("", (ROOT / name).read_text(encoding="utf-8"), count=1), name
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _resolved(link, here, page.file.src_uri), part) for part in parts[::2]]
    return "".join(parts)


def _resolved(link: re.Match[str], here: str, page: str) -> str:
    """One link of the file ``here``, as a link of the page ``page``; only its text if the target is not on the site."""
    mark, text, target, place = link.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
    if path in INCLUDED:
        path = posixpath.join("docs", INCLUDED[path])
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "index.md")
    if not path.startswith("docs/"):
        return text
    # The language of a page follows from the site that it is on: links name the English file.
    there = re.sub(r"\.zh\.md$", ".md", path.removeprefix("docs/"))
    return f"{mark}[{text}]({os.path.relpath(there, posixpath.dirname(page) or '.')}{place or ''})"
