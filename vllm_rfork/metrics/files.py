"""One process's values as files of ``prometheus_client``'s multiprocess mode, which another process reads.

The format belongs to ``prometheus_client``, so its ``MmapedDict`` writes it. Space is allocated before a file is mapped
into memory, and a file never grows: writing to a page that a full disk does not have would kill the process (SIGBUS).
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key

from vllm_rfork.metrics.families import FAMILIES, Family

#: Space of each file in bytes. Series that do not fit are kept in memory only.
FILE_NBYTES = 256 * 1024
#: Bytes of one value beside its key, at most: the key's length, padding, the value and its time.
_ENTRY_NBYTES = 32


def is_stale(name: str) -> bool:
    """True for the gauges of a process of this package that has ended."""
    found = re.search(r"/gauge_live[a-z]+_rfork-([0-9]+)\.db\Z", name)
    return found is not None and not os.path.exists(f"/proc/{found[1]}")


class ValueFiles:
    """The files of this process in ``directory``: one for each kind of metric.

    Gauges of processes that have ended are removed: vLLM's own collector would go on showing them.

    Raises:
        OSError: one cannot be made; none is left.
    """

    def __init__(self, directory: Path) -> None:
        self._files: dict[str, _File] = {}
        for stale in filter(is_stale, map(str, directory.glob("gauge_live*.db"))):
            with contextlib.suppress(OSError):
                os.unlink(stale)
        try:
            for kind in sorted({_kind(family) for family in FAMILIES}):
                self._files[kind] = _File(directory / f"{kind}_rfork-{os.getpid()}.db")
        except OSError:
            self.close()
            for file in self._files.values():
                file.path.unlink(missing_ok=True)
            raise

    def write(self, family: Family, sample: str, labels: dict[str, str], value: float) -> None:
        """Write one sample; one that no longer fits is left out."""
        name = family.name.removesuffix("_total")
        key = mmap_key(name, sample, list(labels), list(labels.values()), family.help)
        self._files[_kind(family)].write(key, value)

    def close(self) -> None:
        """Close the files, which stay. Idempotent."""
        for file in self._files.values():
            file.close()


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        _allocate(path)
        try:
            self._values = MmapedDict(str(path))  # type: ignore[no-untyped-call]
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._keys: set[str] = set()
        self._left_nbytes = FILE_NBYTES - _ENTRY_NBYTES

    def write(self, key: str, value: float) -> None:
        if key not in self._keys:
            nbytes = len(key.encode()) + _ENTRY_NBYTES
            if nbytes > self._left_nbytes:
                return
            self._left_nbytes -= nbytes
            self._keys.add(key)
        self._values.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._values.close()  # type: ignore[no-untyped-call]


def _allocate(path: Path) -> None:
    """Make an empty file with allocated space. It gets its name last: readers fail on one that has no bytes yet."""
    unnamed = path.with_suffix(".new")
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, FILE_NBYTES)
        unnamed.rename(path)
    except OSError:
        unnamed.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _kind(family: Family) -> str:
    """The beginning of the file's name, from which ``prometheus_client`` knows how to merge processes."""
    return f"gauge_live{family.merged}" if family.kind == "gauge" else family.kind
