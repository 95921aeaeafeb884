"""The speed of network storage, applied to a loader that reads from page cache.

It imports nothing, so that the demo and its tests need no vLLM for it; :mod:`demo.throttled_server` is its user.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

#: The load format of throttled servers, and the key of its rate in the extra config; other servers have neither.
FORMAT = "throttled"
RATE = "throttled_mb_per_s"

#: In MB/s: what 1 Gbit/s of network carries, such as one worker's share of a file server with 10 Gbit/s.
DEFAULT_RATE = 125


class Sized(Protocol):
    """A tensor, as far as it matters here."""

    @property
    def nbytes(self) -> int:
        """Its bytes."""


T = TypeVar("T", bound=Sized)


def throttled(
    tensors: Iterable[tuple[str, T]],
    mb_per_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[str, T]]:
    """Yield ``tensors``, each one as late as storage of ``mb_per_s`` would have delivered its last byte.

    A slower source is not delayed further: the time that it takes counts.
    """
    start = clock()
    nbytes = 0
    for name, tensor in tensors:
        nbytes += tensor.nbytes
        sleep(max(0.0, start + nbytes / (mb_per_s * 1e6) - clock()))
        yield name, tensor
