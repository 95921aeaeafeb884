"""The progress bar of a long read, as vLLM shows one while it loads shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def forking_progress(nbytes: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar over ``nbytes`` bytes; yields a function that is told how many have been copied so far."""
    with tqdm(total=nbytes, desc="Forking weights", unit="B", unit_scale=True, disable=not shown) as bar:
        yield lambda copied: bar.update(copied - bar.n) and None
