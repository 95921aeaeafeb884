"""The seconds that producing a cache took, noted beside it: a later start of this host finds the cache alone."""

from __future__ import annotations

import contextlib
import os

from vllm_rfork.caches.bounds import MAX_SECONDS
from vllm_rfork.caches.directories import new_file, open_file, opened_below, opened_root, write_all
from vllm_rfork.caches.paths import OWN
from vllm_rfork.vllm_compat.start_up.listener import CachePlace

_MAX_NBYTES = 32


def note(place: CachePlace, seconds: float) -> None:
    """Note the time of the cache at ``place``, unless there is a note. A directory that takes none has none."""
    with (
        contextlib.suppress(OSError),
        opened_root(place.root) as top,
        opened_below(top, place.directory) as directory,
    ):
        descriptor = new_file(_name(place), directory)
        try:
            write_all(descriptor, memoryview(f"{seconds:.3f}".encode()))
        finally:
            os.close(descriptor)


def noted(place: CachePlace) -> float | None:
    """The time of the cache at ``place`` in seconds; None if there is no note, or one that is not a time."""
    with (
        contextlib.suppress(OSError, ValueError),
        opened_root(place.root) as top,
        opened_below(top, place.directory) as directory,
        os.fdopen(open_file(_name(place), directory), "rb") as file,
    ):
        seconds = float(file.read(_MAX_NBYTES))
        return seconds if 0 <= seconds <= MAX_SECONDS else None
    return None


def _name(place: CachePlace) -> str:
    """Its beginning keeps it out of what is collected."""
    return f"{OWN}seconds-{place.kind}"
