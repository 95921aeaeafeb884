"""A resolver that does not answer, as behind a broken DNS, and the threads that wait for it."""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from vllm_rfork.threads import native


class HangingNames:
    """Calls of the resolver, which hang until the block of :func:`hanging_names` ends.

    Attributes:
        asked: set at the first call.
    """

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.answer = threading.Event()
        self._before = set(threading.enumerate())

    def waiting(self) -> set[threading.Thread]:
        """The threads that have been started since."""
        return set(threading.enumerate()) - self._before

    def joined_at_exit(self) -> set[threading.Thread]:
        """Those for which Python, or this package for the sake of native code, waits when the process exits."""
        waited_for = {*concurrent.futures.thread._threads_queues, *native._threads}
        return {thread for thread in self.waiting() if not thread.daemon or thread in waited_for}


@contextlib.contextmanager
def hanging_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingNames]:
    """Inside the block, no name is resolved."""
    names = HangingNames()

    def getaddrinfo(*arguments: object, **options: object) -> object:
        names.asked.set()
        names.answer.wait(30)
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    try:
        yield names
    finally:
        left = names.waiting()
        names.answer.set()
        for thread in left:
            thread.join(10)
