"""One test per check of the scenarios; ``python -m zoo.events`` runs them, with the fixtures of ``zoo.plugin``."""

from __future__ import annotations

import pytest

from zoo.scenario_results import FAILED, NOT_HERE, Sheet


def test_event(check: str, sheet: Sheet) -> None:
    """Fail with what was seen; skip what this platform does not have."""
    row = sheet.wait(check)
    if row.verdict == FAILED:
        pytest.fail(str(row), pytrace=False)
    if row.verdict == NOT_HERE:
        pytest.skip(row.seen)
