"""The opening of the store at the planner's start, which is tried again while the store is unavailable."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vllm_rfork.net.seldom import Seldom
from vllm_rfork.planner.store.base import Store
from vllm_rfork.planner.store.errors import StoreUnavailable

logger = logging.getLogger(__name__)

#: The planner begins to listen after the first attempt, and after this many seconds at the latest.
FIRST_ATTEMPT_S = 1.0
#: Pauses between two attempts, in seconds: the first one, and the longest; each is twice as long as the one before.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0


class StoreOpening:
    """Opens ``store`` at once or in the background, so that probes and metrics are answered meanwhile.

    Args:
        limit_s: give up after this many seconds; 0: never.
        failed: called when the background attempts have ended without success.
        sleep: replaced in tests.
    """

    def __init__(
        self,
        store: Store,
        limit_s: float,
        failed: Callable[[], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._limit_s = limit_s
        self._failed = failed
        self._sleep = sleep
        self._seldom = Seldom(logger)
        self._attempts: asyncio.Task[None] | None = None
        self._error: BaseException | None = None

    async def begin(self) -> None:
        """Open the store, or go on trying in the background if it is unavailable, or does not answer soon."""
        started_at = asyncio.get_running_loop().time()
        first = asyncio.ensure_future(self._store.open())
        try:
            done, _ = await asyncio.wait({first}, timeout=FIRST_ATTEMPT_S)
        except asyncio.CancelledError:
            first.cancel()
            raise
        if not done or isinstance(first.exception(), StoreUnavailable):
            self._attempts = asyncio.create_task(self._go_on(first, started_at))
            self._attempts.add_done_callback(self._ended)
        else:
            first.result()

    async def close(self) -> None:
        """End the attempts."""
        attempts = self._attempts
        while attempts is not None and not attempts.done():
            # Until Python 3.12, wait_for loses a cancellation that arrives together with the answer.
            attempts.cancel()
            await asyncio.wait({attempts}, timeout=0.1)

    def check(self) -> None:
        """Raise what ended the attempts: :class:`StoreUnavailable` after ``limit_s``."""
        if self._error is not None:
            raise self._error

    def _ended(self, attempts: asyncio.Task[None]) -> None:
        if not attempts.cancelled() and (error := attempts.exception()) is not None:
            self._error = error
            self._failed()

    async def _go_on(self, attempt: Awaitable[None], started_at: float) -> None:
        """Wait for ``attempt``, and for further ones until one succeeds."""
        loop = asyncio.get_running_loop()
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                await attempt
            except StoreUnavailable as error:
                self._seldom.warning("wait", "The planner waits for its store: %s", error)
                waited_s = loop.time() - started_at
                if self._limit_s and waited_s + pause_s > self._limit_s:
                    raise
            else:
                logger.info("The store is available, after %.1f s", loop.time() - started_at)
                return
            await self._sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            attempt = self._store.open()
