"""The RDMA devices that this process can use."""

from __future__ import annotations

import os
from pathlib import Path

#: The kernel's list of devices. A container sees the host's, although it may be unable to open one of them.
DEVICES = Path("/sys/class/infiniband")
#: The device files through which a process uses them; a container has those that it was given.
FILES = Path("/dev/infiniband")
_ACTIVE = "ACTIVE"


def rdma_obstacle() -> str | None:
    """The reason why no RDMA device can be used here, for messages; None if one can."""
    names = _entries(DEVICES, "*")
    if not names:
        return "there is no RDMA device"
    files = _entries(FILES, "uverbs*")
    if not files:
        return f"the RDMA devices of this host are not in this container ({FILES}/uverbs* is missing)"
    if not any(os.access(file, os.R_OK | os.W_OK) for file in files):
        return f"this user may not open the RDMA devices ({FILES}/uverbs*)"
    if not any(_has_active_port(name) for name in names):
        return "no RDMA port is active"
    return None


def _entries(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _has_active_port(device: Path) -> bool:
    """Return True unless every port of ``device`` is known to be down."""
    states = []
    for file in _entries(device, "ports/*/state"):
        try:
            states.append(file.read_text())  # such as "4: ACTIVE"
        except OSError:
            return True
    return not states or any(_ACTIVE in state for state in states)
