"""The files of installed packages, found without importing them: that takes every test process half a minute."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def folder(package: str) -> Path:
    """Return the folder of an installed package's files."""
    found = importlib.util.find_spec(package)
    assert found is not None, f"{package} is not installed"
    assert found.origin is not None
    return Path(found.origin).parent
