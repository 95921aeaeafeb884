"""Print the lines of a lock file that an environment does not satisfy; runs on that environment's own Python.

A distribution is broken if it is missing, has another version, or lacks files that its RECORD lists: an interrupted
install leaves such a distribution, and pip considers it installed. Standard library only.
"""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path

PIN = re.compile(
    r"""^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^;\s]+)(\s*;\s*platform_machine\s*==\s*"(?P<machine>\w+)")?\s*$"""
)


def pins(lock: str) -> dict[str, tuple[str, str]]:
    """Map each name to (version, whole line), for the lines of ``lock`` that apply to this processor.

    Raises:
        ValueError: a line is neither a comment nor an exact pin.
    """
    found: dict[str, tuple[str, str]] = {}
    for line in lock.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = PIN.match(line)
        if match is None:
            raise ValueError(f"not an exact pin: {line!r}")
        if match["machine"] in (None, platform.machine()):
            found[match["name"]] = (match["version"], line)
    return found


def is_whole(dist: metadata.Distribution) -> bool:
    """Return True if every file of the distribution exists, compiled caches aside."""
    files = dist.files
    return bool(files) and all(
        file.suffix == ".pyc" or Path(str(dist.locate_file(file))).exists() for file in files or ()
    )


def broken(lock: str) -> list[str]:
    """List the lines of ``lock`` to install again."""
    lines = []
    for name, (version, line) in pins(lock).items():
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            lines.append(line)
            continue
        if dist.version != version or not is_whole(dist):
            lines.append(line)
    return lines


if __name__ == "__main__":
    print("\n".join(broken(Path(sys.argv[1]).read_text(encoding="utf-8"))))
