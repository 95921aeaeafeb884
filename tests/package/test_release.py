"""The check before an upload: it names what the bill of materials lacks, and the steps that are left."""

from __future__ import annotations

import json
import re
from email.message import Message
from pathlib import Path

import pytest

from scripts import check_release
from vllm_rfork import __version__


def wheel(url: str = "https://forge.org/vllm-rfork") -> Message:
    described = Message()
    for name, value in (
        ("Name", "vllm-rfork"),
        ("Version", "1.2.0"),
        ("Project-URL", f"Repository, {url}"),
        ("Requires-Dist", "prometheus-client>=0.20"),
        ("Requires-Dist", "redis>=5; extra == 'redis'"),
    ):
        described[name] = value
    return described


def bill(**versions: str) -> str:
    return json.dumps({"components": [{"name": name, "version": version} for name, version in versions.items()]})


def test_what_the_bill_of_materials_lacks_is_named() -> None:
    def missing(**versions: str) -> list[str]:
        return check_release.missing_materials(bill(**versions), wheel())

    assert missing(vllm_rfork="1.2.0", prometheus_client="0.26") == []
    assert missing(vllm_rfork="1.2.0", redis="5") == ["prometheus-client"]
    assert missing(vllm_rfork="1.1.0", prometheus_client="0.26") == ["vllm-rfork 1.2.0"]
    assert missing() == ["prometheus-client", "vllm-rfork 1.2.0"]


@pytest.mark.parametrize(
    ("url", "changelog", "steps"),
    [
        ("https://forge.org/vllm-rfork", "## [1.2.0] - 2026-12-01\n", 0),
        ("https://forge.org/vllm-rfork", "## [1.2.0]\n", 1),
        ("https://forge.org/vllm-rfork", "## [1.2.0.1] - 2026-12-01\n", 1),
        ("https://forge.example/vllm-rfork", "## [1.2.0] - 2026-12-01\n", 1),
        ("https://forge.example/vllm-rfork", "## [Unreleased]\n", 2),
    ],
)
def test_steps_that_are_left_are_named(url: str, changelog: str, steps: int, tmp_path: Path) -> None:
    assert len(check_release.steps_left(wheel(url), changelog, tmp_path)) == steps


def test_pages_that_deny_a_release_are_named(tmp_path: Path) -> None:
    """The package index keeps the README of an upload: it must not say that nothing is there."""
    (tmp_path / "docs" / "start").mkdir(parents=True)
    for name, text in {
        "README.md": "the next ones fork. No release is on\nthe package index yet",
        "README.zh-CN.md": "软件包索引上还没有发布版本",
        "docs/faq.md": "No version has been\nreleased yet",
        "docs/start/gpu.md": "pip install vllm-rfork  # until there is a release: pip install .",
        "docs/start/cpu.md": "Each release has notes.",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    pages = ["README.md", "README.zh-CN.md", "docs/faq.md", "docs/start/gpu.md"]
    assert check_release.unreleased_pages(tmp_path) == pages
    (step,) = check_release.steps_left(wheel(), "## [1.2.0] - 2026-12-01\n", tmp_path)
    assert step.endswith(": " + ", ".join(pages))


def test_the_first_release_has_no_history_of_builds_that_nobody_has() -> None:
    changelog = (check_release.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(r"^## \[\d", changelog, re.MULTILINE):
        assert re.findall(r"^### (.+)$", changelog, re.MULTILINE) == ["Added", "Security"]


def test_a_page_and_its_translation_say_the_same_of_releases() -> None:
    found = set(check_release.unreleased_pages(check_release.ROOT))
    docs = check_release.ROOT / "docs"
    translated = {path.relative_to(check_release.ROOT).as_posix() for path in docs.rglob("*.zh.md")}
    pairs = {"README.zh-CN.md": "README.md", **{name: name.replace(".zh.md", ".md") for name in translated}}
    assert {pairs[name] for name in found & pairs.keys()} == found & set(pairs.values())


def test_every_tag_of_an_image_is_the_version() -> None:
    tag = re.compile(r"vllm-rfork-(?:planner|cuda|ascend|cpu):(\d[\d.]*\d)|newTag: (\S+)")
    folders = [check_release.ROOT / name for name in ("deploy", "docs/quick-start")]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    found = {(path, "".join(each)) for path in files for each in tag.findall(path.read_text(encoding="utf-8"))}
    assert len({path for path, _ in found}) >= 10
    assert [f"{path}: {version}" for path, version in sorted(found) if version != __version__] == []
