"""Checks after any failure: the default loader's model, one WARNING, and no leftovers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.open_engines import open_engines
from tests.vllm.conftest import LogRecords, eventually, extra_for
from tests.vllm.engine_process import load_digested, vllm_config
from vllm_rfork.net.event_loop import background
from vllm_rfork.vllm_compat.start_up.listener import listener


def things_that_leak() -> tuple[set[str], set[int]]:
    """Return this package's threads by name and child processes by pid."""
    threads = {thread.name for thread in threading.enumerate() if "rfork" in thread.name.lower()}
    return threads, {child.pid for child in psutil.Process().children(recursive=True)}


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Check after the block that no thread, process, open engine or registration was added."""
    background()  # the process-wide loop is there for good; it is not what is looked for
    threads, processes = things_that_leak()

    def clean() -> bool:
        now_threads, now_processes = things_that_leak()
        idle_io = {name for name in now_threads if "-io" in name}
        return not (now_threads - threads - idle_io) and now_processes <= processes and not open_engines()

    yield
    listener().warm()  # as the worker does, when a seed's caches are of no more use
    eventually(clean, f"threads, processes and engines of before (now {things_that_leak()}, {open_engines()})")


def falls_back(
    model: Path,
    expected: Any,
    url: str,
    log: LogRecords,
    *,
    cause: str,
    leases: Callable[[], int] | None = None,
    **extra: Any,
) -> float:
    """Load ``model`` with the planner at ``url``, make all checks of a failure, and return the duration in seconds."""
    with nothing_left_behind():
        started = time.monotonic()
        options = extra_for(url, **{"rfork_become_seed": False, **extra})
        loaded = load_digested(vllm_config(model, load_format="rfork", extra=options))
        seconds = time.monotonic() - started
    assert loaded.before == expected.before
    assert loaded.after == expected.after
    warnings = [line for line in log.warnings if "falling back" in line]
    assert len(warnings) == 1, log.warnings
    assert cause in warnings[0], warnings[0]
    if leases is not None:
        eventually(lambda: leases() == 0, "no lease is left at the planner")
    return seconds
