"""The end of a process that reads orders from its standard input."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any

#: Time in seconds for withdrawing a seed and leaving.
_WITHIN_S = 30.0


def end(process: subprocess.Popen[Any]) -> None:
    """Close its standard input, so that it withdraws its seed and exits; kill it if it does not."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    try:
        process.wait(_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
