"""The part of `make release-check` that twine does not do: the bill of materials, and the steps before an upload.

It exits with 1 if the bill of materials lacks what the wheel needs. Steps that are left are printed, and no error:
the check also runs between releases.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
#: Sentences that become wrong with the first release. The package index shows the README of the upload for good.
UNRELEASED = re.compile(
    r"\b[Nn]o (?:release|version has been released)\b|until there is a release|还没有发布版本|发布之前：在克隆"
)


def metadata(folder: Path) -> Message:
    """The METADATA of the wheel in ``folder``."""
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def missing_materials(bill: str, wheel: Message) -> list[str]:
    """Hard dependencies of ``wheel``, and the wheel itself, that the bill of materials (CycloneDX, JSON) lacks."""
    listed = {canonicalize_name(each["name"]): each.get("version") for each in json.loads(bill)["components"]}
    needed = [Requirement(str(line)) for line in wheel.get_all("Requires-Dist") or []]
    hard = [each.name for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    missing = {name for name in hard if not listed.get(canonicalize_name(name))}
    if listed.get(canonicalize_name(wheel["Name"])) != wheel["Version"]:
        missing.add(f"{wheel['Name']} {wheel['Version']}")
    return sorted(missing)


def unreleased_pages(root: Path) -> list[str]:
    """Pages below ``root`` that say that there is no release, relative to it."""
    pages = [*root.glob("README*.md"), *(root / "docs").rglob("*.md")]
    return sorted(
        page.relative_to(root).as_posix()
        for page in pages
        if UNRELEASED.search(" ".join(page.read_text(encoding="utf-8").split()))
    )


def steps_left(wheel: Message, changelog: str, root: Path = ROOT) -> list[str]:
    """Steps of RELEASING.md that this tree has not taken yet."""
    steps = []
    if any(".example/" in str(url) for url in wheel.get_all("Project-URL") or []):
        steps.append("the repository's address in pyproject.toml is a placeholder")
    if not re.search(rf"^## \[{re.escape(wheel['Version'])}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        steps.append(f"CHANGELOG.md has no section [{wheel['Version']}] with a date")
    if pages := unreleased_pages(root):
        steps.append(f"these pages say that there is no release: {', '.join(pages)}")
    return steps


def main(folder: Path) -> int:
    """Print what is missing in ``folder``; returns the exit code."""
    wheel = metadata(folder)
    missing = missing_materials((folder / "sbom.cdx.json").read_text(encoding="utf-8"), wheel)
    for name in missing:
        print(f"missing in the bill of materials: {name}")
    steps = steps_left(wheel, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for step in steps:
        print(f"before an upload: {step}")
    if missing:
        return 1
    print("not to be uploaded yet" if steps else "ready for an upload", f"({folder})")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
