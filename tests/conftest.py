"""Group the tests for pytest-xdist, so that its processes are busy all the time and share no expensive fixture.

Two groups load models: one in the test process, and one in processes that a fork server starts. They begin first, one
in each process. Every other file is a group of its own and fills the time that remains.

TEST_CPU emulates a lesser processor in all of them: see ``processor/sitecustomize.py``.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROCESSOR = Path(__file__).parent / "processor"

if os.environ.get("TEST_CPU") and not any(type(finder).__name__ == "HidesFeatures" for finder in sys.meta_path):
    # Processes that the tests start emulate it by themselves: Python imports sitecustomize.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROCESSOR), os.environ.get("PYTHONPATH")]))
    from tests.processor import sitecustomize  # noqa: F401 - emulates when it is imported


#: Files of tests/vllm whose models are in processes of the fork server, which imports vLLM once for all of them.
FORK_SERVER = frozenset(
    f"tests/vllm/test_{name}.py"
    for name in ("amx", "constructor_that_raises", "engine_core", "engines", "failed_draft", "ranks", "zoo")
)

#: The groups that begin first, in order.
FIRST = {"vllm, fork server": 0, "vllm, test process": 1}


def group(nodeid: str) -> str:
    """Name the group of a test; one process runs all tests of a group."""
    file = nodeid.partition("::")[0]
    if not file.startswith("tests/vllm/"):
        return file
    return "vllm, fork server" if file in FORK_SERVER else "vllm, test process"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Deal out whole groups, whatever ``--dist`` is. With pytest 9.2, xdist 3.8 ignores its marker for groups."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    config.option.loadscopereorder = False  # else groups with few tests, which take longest, begin last
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the two groups that take longest first."""
    items.sort(key=lambda item: FIRST.get(group(item.nodeid), len(FIRST)))


def pytest_collection_finish() -> None:
    """Leave what was collected out of all that collects garbage from here on: looking at it takes a second each."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else native modules complain of leaks


@pytest.fixture(autouse=True)
def propagating_loggers() -> Iterator[None]:
    """Let ``caplog`` see the package's lines although an earlier test has put its loggers below vLLM's."""
    ours = logging.getLogger("vllm_rfork")
    parent = ours.parent
    ours.parent = logging.root
    ours.setLevel(ours.level)  # forgets which levels were enabled
    yield
    ours.parent = parent
    ours.setLevel(ours.level)
