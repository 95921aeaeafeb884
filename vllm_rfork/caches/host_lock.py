"""A lock among the processes of one user and host that install into one cache root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Iterator

from vllm_rfork.caches.paths import OWN
from vllm_rfork.errors import CacheError

#: Pause between two attempts, in seconds.
_PAUSE_S = 0.02


@contextlib.contextmanager
def host_lock(
    root: int,
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Iterator[None]:
    """Hold the lock of this user and host in the open directory ``root``. The kernel releases it if the process dies.

    A root that several hosts or users share has one lock for each of them: not every file system has locks between
    hosts, one user may not open another's file, and the installer never overwrites in any case.

    Raises:
        CacheError: another process holds it for longer than ``timeout_s``.
        OSError: the lock's file cannot be opened.
    """
    name = f"{OWN}lock-{os.geteuid()}-{re.sub('[^A-Za-z0-9_.-]', '_', socket.gethostname())[:100]}"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(name, flags, 0o666, dir_fd=root)
    deadline = clock() + timeout_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if clock() >= deadline:
                    raise CacheError(f"another process installs caches for longer than {timeout_s:g} s") from None
                sleep(_PAUSE_S)
        yield
    finally:
        os.close(descriptor)  # which releases the lock
