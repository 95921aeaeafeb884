"""The progress bar of a long read, like vLLM's for the shards of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def forking_progress(nbytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over ``nbytes`` bytes; yields a function that takes the number of bytes copied so far.

    The bar appears with the first bytes: nothing is shown if there is no seed.
    """
    bar: tqdm[None] | None = None

    def update(copied: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=nbytes, desc="Forking weights", unit="B", unit_scale=True, disable=not shown)
        bar.update(copied - bar.n)

    try:
        yield update
    finally:
        if bar is not None:
            bar.close()
