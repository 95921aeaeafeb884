"""The oldest versions that the package allows are those whose bounds it relies on."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


def dependency(name: str) -> Requirement:
    text = PROJECT.read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    found = [Requirement(each) for each in re.findall(r'^\s*"([^"]+)"', listed[1], re.MULTILINE)]
    return next(each for each in found if each.name == name)


@pytest.mark.parametrize("unbounded", ["3.10.11", "3.11.18", "3.13.5", "3.14.0", "3.14.1"])
def test_no_aiohttp_is_allowed_that_takes_endless_headers(unbounded: str) -> None:
    """One connection's endless headers took 4.4 GB of 3.10.11 in 8 seconds."""
    assert not dependency("aiohttp").specifier.contains(unbounded)


def test_the_floor_itself_and_the_tested_version_are_allowed() -> None:
    assert dependency("aiohttp").specifier.contains("3.14.2")
    assert dependency("aiohttp").specifier.contains(version("aiohttp")), sys.executable
