"""Access to another process's memory on this machine, and preparation of pages that are about to be written.

``process_vm_readv`` needs the same uid (or the right to trace) and the same pid namespace; two containers usually have
neither. Raises ``OSError`` only; adapters translate it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

_PAGE = os.sysconf("SC_PAGE_SIZE")
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE; Python's mmap module does not name it


class _Iovec(ctypes.Structure):
    _fields_: ClassVar[Sequence[tuple[str, type]]] = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


@functools.cache
def _readv() -> Any:
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    function.restype = ctypes.c_ssize_t
    iovec, count = ctypes.POINTER(_Iovec), ctypes.c_ulong
    function.argtypes = [ctypes.c_int, iovec, count, iovec, count, count]
    return function


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def read_process(pid: int, local: int, remote: int, nbytes: int) -> None:
    """Copy ``nbytes`` (> 0) from ``remote`` in process ``pid`` to ``local`` in this one, without the GIL.

    Raises:
        OSError: no such process, no permission, or unmapped memory on either side; some bytes may have been copied.
    """
    done = 0
    while done < nbytes:
        mine = _Iovec(local + done, nbytes - done)
        theirs = _Iovec(remote + done, nbytes - done)
        got: int = _readv()(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
        if got <= 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        done += got


def touch(address: int, nbytes: int) -> None:
    """Ask the kernel to map the pages of ``nbytes`` at ``address`` for writing; their contents do not change.

    One call for many pages costs about half as much as one page fault at a time, in the middle of a copy. This is a
    hint: with an older kernel (Linux < 5.14), or other kinds of memory, the copy itself faults the pages in.
    """
    start = address // _PAGE * _PAGE
    _madvise()(start, address + nbytes - start, _POPULATE_WRITE)


def process_started(pid: int) -> int:
    """The start of process ``pid`` in clock ticks since boot, to recognize a reused pid; 0 if there is no process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in brackets may contain anything, so fields are counted after it; the start is field 22 of proc(5).
    state, *rest = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(rest[18])
