"""The caches that this process offers as a seed. One slot for the process: its models share compilers and caches."""

from __future__ import annotations

from vllm_rfork.caches.offered import Offered


class _Slot:
    offered: Offered | None = None


def current() -> Offered | None:
    """The present offer; None until warm-up is over and the directories are quiet."""
    return _Slot.offered


def replace(offered: Offered | None) -> None:
    """Make ``offered`` the present offer."""
    _Slot.offered = offered
