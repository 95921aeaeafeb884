"""The caches that this process offers as a seed. One slot for the process: its models share compilers and caches."""

from __future__ import annotations

import atexit
from collections.abc import Callable

from vllm_rfork.caches.offered import Offered


class _Slot:
    offered: Offered | None = None
    start: object = None
    expected = False
    stop: Callable[[], object] | None = None


def current() -> Offered | None:
    """The present offer; None until warm-up is over and the directories are quiet."""
    return _Slot.offered


def begin(start: object, *, expected: bool) -> None:
    """Take note of a start, and drop the offer of an earlier one; ``expected``: there will be one after warm-up."""
    _Slot.offered, _Slot.start, _Slot.expected = None, start, expected


def collecting(stop: Callable[[], object]) -> None:
    """Take note that caches are being collected until ``stop`` is called."""
    _Slot.stop = stop


def end() -> None:
    """Stop collecting: nobody can ask this process any more."""
    if _Slot.stop is not None:
        _Slot.stop()


def source() -> Callable[[], Offered | None] | None:
    """:func:`current` for a seed service; None if this process carries no caches, so that no receiver asks again."""
    return current if _Slot.expected else None


def replace(start: object, offered: Offered) -> None:
    """Make ``offered`` the present offer, unless another start has begun since."""
    if start is _Slot.start:
        _Slot.offered = offered


atexit.register(end)
