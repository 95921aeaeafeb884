"""The host's identity, which processes in different containers of one host share."""

from __future__ import annotations

from pathlib import Path


def boot_id() -> str:
    """Names the running kernel of this host.

    Raises:
        OSError: it cannot be read.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
