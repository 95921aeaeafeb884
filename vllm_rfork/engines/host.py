"""Facts of this host that decide which lanes are possible."""

from __future__ import annotations

from pathlib import Path


def boot_id() -> str:
    """The identifier of the running kernel.

    Raises:
        OSError: it cannot be read.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def rdma_devices() -> list[str]:
    """The names of this host's RDMA devices, such as ``mlx5_0``, as far as this container has them."""
    try:
        return sorted(each.name for each in Path("/sys/class/infiniband").iterdir())
    except OSError:
        return []
