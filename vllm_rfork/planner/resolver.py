"""Name resolution that callers cannot exhaust: the threads are bounded, in total and per caller.

A blocked ``getaddrinfo`` cannot be cancelled, so each runs on its own daemon thread: it does not occupy the shared
threads of the event loop and does not delay the end of the process.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

TIMEOUT_S = 2.0
#: Maximum number of look-ups at once, of all callers and of one.
MAX_LOOKUPS = 32
MAX_OF_ONE = 2
#: A name that was slow is not looked up again for this many seconds.
SLOW_S = 30.0
_MAX_SLOW = 4096
#: Errors of ``getaddrinfo`` for a name that does not exist. Others mean that the resolver does not work now.
_NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})


class Unresolved(Exception):
    """The name could not be looked up now. HTTP 503."""


def look_up(name: str) -> list[str]:
    """Return the addresses of ``name``. Blocks. Raises OSError, UnicodeError."""
    return [str(each[4][0]) for each in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]


class Resolver:
    """Looks up names for callers, which are identified by an address. Belongs to one event loop.

    Args:
        clock: seconds, never backwards; replaced in tests.
        find: the blocking look-up; replaced in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, find: Callable[[str], list[str]] = look_up) -> None:
        self._clock = clock
        self._find = find
        self._running: dict[str, asyncio.Future[list[str]]] = {}
        self._of: Counter[str] = Counter()
        self._slow: dict[str, float] = {}

    async def addresses(self, name: str, caller: str) -> list[str]:
        """Return the addresses of ``name``; an empty list if it does not exist.

        Raises:
            Unresolved: no answer within ``TIMEOUT_S``, the resolver does not work, or too many look-ups run.
        """
        found = self._running.get(name)
        if found is None:
            if self._slow.get(name, 0.0) > self._clock():
                raise Unresolved(f"the host name {name} could not be looked up a moment ago")
            if len(self._running) >= MAX_LOOKUPS or self._of[caller] >= MAX_OF_ONE:
                raise Unresolved(f"the host name {name} cannot be looked up now: too many look-ups are running")
            found = self._start(name, caller)
        try:
            # Shielded: the thread continues, and the next caller that asks for the name can use its answer.
            return await asyncio.wait_for(asyncio.shield(found), TIMEOUT_S)
        except asyncio.TimeoutError as error:
            if len(self._slow) >= _MAX_SLOW:
                self._slow.clear()
            self._slow[name] = self._clock() + SLOW_S
            raise Unresolved(f"the host name {name} was not found within {TIMEOUT_S:g} s") from error

    def _start(self, name: str, caller: str) -> asyncio.Future[list[str]]:
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[str]] = loop.create_future()
        self._running[name] = found
        self._of[caller] += 1

        def finish(answer: list[str] | Unresolved) -> None:
            del self._running[name]
            self._of[caller] -= 1
            if not self._of[caller]:
                del self._of[caller]
            if isinstance(answer, Unresolved):
                found.set_exception(answer)
                found.exception()  # fetched: the caller may have hung up, and asyncio would log it
            else:
                self._slow.pop(name, None)
                found.set_result(answer)

        def run() -> None:
            answer: list[str] | Unresolved
            try:
                answer = self._find(name)
            except socket.gaierror as error:
                gone = error.errno in _NO_SUCH_NAME
                answer = [] if gone else Unresolved(f"the host name {name} cannot be looked up: {error.strerror}")
            except (OSError, UnicodeError) as error:
                answer = [] if isinstance(error, UnicodeError) else Unresolved(f"{name} cannot be looked up: {error}")
            try:
                loop.call_soon_threadsafe(finish, answer)
            except RuntimeError:
                return  # the loop has ended

        threading.Thread(target=run, name="rfork-resolver", daemon=True).start()
        return found
