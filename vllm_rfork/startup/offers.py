"""The caches that this process offers as a seed. One slot for the process: its models share compilers and caches."""

from __future__ import annotations

from collections.abc import Callable

from vllm_rfork.caches.offered import Offered


class _Slot:
    offered: Offered | None = None
    expected = False


def current() -> Offered | None:
    """The present offer; None until warm-up is over and the directories are quiet."""
    return _Slot.offered


def expect() -> None:
    """Take note that this process will have an offer after its warm-up."""
    _Slot.expected = True


def source() -> Callable[[], Offered | None] | None:
    """:func:`current` for a seed service; None if this process carries no caches, so that no receiver asks again."""
    return current if _Slot.expected else None


def replace(offered: Offered | None) -> None:
    """Make ``offered`` the present offer."""
    _Slot.offered = offered
