"""The identifier of this host, the same in all its containers."""

from __future__ import annotations

from pathlib import Path


def boot_id() -> str:
    """The identifier of the running kernel.

    Raises:
        OSError: it cannot be read.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
