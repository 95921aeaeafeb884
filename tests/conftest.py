"""Deals the tests out to two processes: those that load models in one, all the others in the other.

Tests of one file share fixtures, and those of tests/vllm share seeds, planners and checkpoints, which take minutes to
make: what belongs together stays together. Without ``-n`` nothing changes.

TEST_CPU emulates a lesser processor in all of them: see ``processor/sitecustomize.py``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

VLLM = Path(__file__).parent / "vllm"
PROCESSOR = Path(__file__).parent / "processor"

if os.environ.get("TEST_CPU") and not any(type(finder).__name__ == "HidesFeatures" for finder in sys.meta_path):
    # Processes that the tests start emulate it by themselves: Python imports sitecustomize.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROCESSOR), os.environ.get("PYTHONPATH")]))
    from tests.processor import sitecustomize  # noqa: F401 - emulates when it is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group by file; all of tests/vllm is one group."""
    for item in items:
        name = "vllm" if VLLM in item.path.parents else str(item.path)
        item.add_marker(pytest.mark.xdist_group(name))
