"""Reading another process's memory on this machine, and who that process is.

``process_vm_readv`` needs the same uid (or the right to trace) and the same pid namespace; two containers usually have
neither. Raises ``OSError`` only; adapters translate it. Must not import an engine.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar


class _Iovec(ctypes.Structure):
    _fields_: ClassVar[Sequence[tuple[str, type]]] = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]


@functools.cache
def _readv() -> Any:
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    function.restype = ctypes.c_ssize_t
    iovec, count = ctypes.POINTER(_Iovec), ctypes.c_ulong
    function.argtypes = [ctypes.c_int, iovec, count, iovec, count, count]
    return function


def read_process(pid: int, local: int, remote: int, nbytes: int) -> None:
    """Copy ``nbytes`` (> 0) from ``remote`` in process ``pid`` to ``local`` here; the GIL is released meanwhile.

    Raises:
        OSError: no such process, no right to read it, or memory that is not there on either side; some of the bytes
            may have been copied.
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


def process_started(pid: int) -> int:
    """When process ``pid`` started, in clock ticks since boot; 0 where there is none. Tells a reused pid apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in brackets may hold anything, so fields are counted after it; the start is field 22 of proc(5).
    state, *rest = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(rest[18])
