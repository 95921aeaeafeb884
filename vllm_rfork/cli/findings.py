"""The doctor's findings, and checks that run side by side and end in time on any machine."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_rfork.logs.quoting import printable
from vllm_rfork.threads.deadline import start_on_thread

OK, NOTE, FAIL = "ok", "note", "fail"


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``state`` is ``ok``, ``note`` (may be intended) or ``fail``."""

    check: str
    state: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Check:
    """A check: the name of its finding if it cannot be made, the call, and its bound in seconds."""

    name: str
    find: Callable[[], Finding]
    bound_s: float = 5.0


def find_all(checks: Sequence[Check]) -> list[Finding]:
    """The findings of ``checks`` in their order.

    All run at once, each on a thread that is left behind at its bound: a driver that hangs must not stop the command.
    """
    began = time.monotonic()
    started = [start_on_thread(check.find, f"rfork-doctor {check.name}", delays_exit=False) for check in checks]
    return [_result(check, future, began) for check, future in zip(checks, started, strict=True)]


def _result(check: Check, future: concurrent.futures.Future[Finding], began: float) -> Finding:
    try:
        return future.result(max(0.0, began + check.bound_s - time.monotonic()))
    except concurrent.futures.TimeoutError:
        return Finding(check.name, NOTE, f"no result within {check.bound_s:g} s", "see dmesg for a driver that hangs")
    except Exception as error:  # noqa: BLE001 - an odd machine is a finding
        return Finding(check.name, NOTE, printable(f"cannot be found out: {type(error).__name__}: {error}"))
