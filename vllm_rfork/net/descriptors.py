"""Descriptors of this process (``RLIMIT_NOFILE``), and the number of connections that they permit."""

from __future__ import annotations

import os
import resource
import sys


def limit() -> int:
    """Descriptors that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def spare() -> int:
    """Descriptors that this process may open beyond those that are open."""
    return max(0, limit() - len(os.listdir("/proc/self/fd")))


def connections(wanted: int, *, kept: int, share: float = 1.0) -> int:
    """The number of connections to allow, at least 1.

    Args:
        wanted: never more than this.
        kept: descriptors that are left to the rest of the process.
        share: the part of the spare ones, from 0 to 1, that connections may take.
    """
    return max(1, min(wanted, int((spare() - kept) * share)))
