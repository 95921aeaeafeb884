"""Deals the tests out to two processes: those that load models in one, all the others in the other.

Tests of one file share fixtures, and those of tests/vllm share seeds, planners and checkpoints, which take minutes to
make: what belongs together stays together. Without ``-n`` nothing changes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

VLLM = Path(__file__).parent / "vllm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group by file; all of tests/vllm is one group."""
    for item in items:
        name = "vllm" if VLLM in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))
