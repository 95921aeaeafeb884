"""The transfer of a seed's caches, on a thread of its own while the model is loaded.

Nothing waits for it. An artifact that cannot be fetched costs its transfer and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vllm_rfork.caches.manifest import LEVELS, Artifact, Offer
from vllm_rfork.caches.staging import Staged, remove_abandoned
from vllm_rfork.clients.seed_caches import SeedCaches
from vllm_rfork.errors import CacheError, RForkError, SeedBusy, SeedError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import CACHES_PAUSE_S, SeedAddress
from vllm_rfork.startup.arrivals import Arrivals, Body, Received
from vllm_rfork.startup.settings import FETCH_S, MAX_JSON_NBYTES, ORDER, CacheSettings
from vllm_rfork.threads.daemons import DaemonThreads

logger = worker_logger(__name__)

#: Attempts at one artifact, but for those at which the seed was busy; and the pause between two in seconds.
ATTEMPTS = 3
BUSY_PAUSE_S = 1.0
#: Artifacts in a row that do not arrive, after which the seed is given up.
MAX_MISSING = 2
#: How long what has arrived is kept for hooks that may never ask, in seconds.
KEPT_S = 3_600.0


class Fetch:
    """One transfer, of at most :data:`FETCH_S`. Its thread is a daemon, and ends when warm-up is over.

    Args:
        root: returns the directory under which artifacts of a kind are staged.

    Attributes:
        nbytes, seconds: received so far, and the time of the calls that brought them.
    """

    def __init__(
        self,
        settings: CacheSettings,
        seed: SeedAddress,
        seed_key: str,
        arrivals: Arrivals,
        root: Callable[[str], Path],
        *,
        bound_s: float = FETCH_S,
    ) -> None:
        self.seed = seed
        self.nbytes = 0
        self.seconds = 0.0
        self._settings, self._seed_key, self._arrivals, self._root = settings, seed_key, arrivals, root
        self._client = SeedCaches(request_timeout_s=settings.request_timeout_s, credentials=settings.credentials)
        self._deadline = time.monotonic() + bound_s
        self._fetched = threading.Event()
        self._over = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="rfork-caches", daemon=True)

    def start(self) -> None:
        """Start the thread. Raises RuntimeError at the limit of threads."""
        self._arrivals.asked()
        self._thread.start()

    def stop(self) -> None:
        """End the transfer soon; returns at once."""
        self._over.set()
        if self._task is not None and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._task.cancel)

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing more comes, at most ``timeout_s``; return True if that is so."""
        return self._fetched.wait(timeout_s)

    def _run(self) -> None:
        """The outermost frame of the thread: a start never depends on it."""
        try:
            asyncio.run(self._fetch())
        except asyncio.CancelledError:
            pass  # by stop()
        except Exception as error:  # noqa: BLE001 - a thread of its own; vLLM computes what does not arrive
            level = logging.INFO if isinstance(error, RForkError) else logging.WARNING
            text = "the rest of the caches of seed %s was not taken because of %s: %s"
            logger.log(level, text, self.seed, type(error).__name__, error)
        finally:
            self._fetched.set()
        self._over.wait(KEPT_S)
        self._arrivals.close()

    async def _fetch(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(DaemonThreads("rfork-caches-io"))
        self._task = asyncio.current_task()
        try:
            offer = await self._offer()
        except CacheError as error:
            self._arrivals.failed(f"refused: {error}")
            raise
        if offer is None:
            return
        self._arrivals.listed(offer)
        wanted = self._wanted(offer)
        for root in {self._root(each.kind) for each in wanted if LEVELS[each.kind] == "code"}:
            remove_abandoned(root)
        missing = 0
        for artifact in wanted:
            if self._over.is_set():
                return
            try:
                await self._with_attempts(artifact)
                missing = 0
            except SeedError:
                missing += 1
                if missing == MAX_MISSING or self._left_s() <= 0:
                    raise

    def _wanted(self, offer: Offer) -> list[Artifact]:
        """The artifacts that this worker takes, in their order; JSON is left out where it would be too much memory."""
        taken = [each for each in offer.artifacts if self._settings.takes(each.kind)]
        wanted: list[Artifact] = []
        json_nbytes = 0
        for artifact in sorted(taken, key=lambda each: ORDER.index(each.kind)):
            json_nbytes += artifact.nbytes if LEVELS[artifact.kind] == "safe" else 0
            if LEVELS[artifact.kind] == "safe" and json_nbytes > MAX_JSON_NBYTES:
                reason = f"refused: the seed has more than {MAX_JSON_NBYTES} bytes of JSON"
                self._arrivals.failed(reason, (artifact.kind, artifact.name))
            else:
                wanted.append(artifact)
        return wanted

    async def _with_attempts(self, artifact: Artifact) -> None:
        """Receive one artifact; a seed that is busy is asked until the time is over.

        Raises:
            SeedError: see :meth:`_one`; of the last attempt.
        """
        failures, busy = 0, False
        while True:
            try:
                await self._one(artifact)
            except SeedError as error:
                if not busy or not isinstance(error, SeedBusy):
                    logger.info("caches: %s did not arrive: %s", artifact, error)
                busy = isinstance(error, SeedBusy)
                failures += not busy
                if failures == ATTEMPTS or self._left_s() <= 0:
                    raise
            else:
                return
            await self._pause(BUSY_PAUSE_S)

    async def _offer(self) -> Offer | None:
        """The seed's list; None if the seed is not ready before the time is over."""
        while not self._over.is_set() and self._left_s() > 0:
            started = time.monotonic()
            offer = await self._client.offer(self.seed, self._seed_key)
            self.seconds += time.monotonic() - started
            if offer is not None:
                return offer
            await self._pause(CACHES_PAUSE_S)
        return None

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, max(0.0, self._left_s())))

    async def _one(self, artifact: Artifact) -> None:
        """Receive one artifact.

        Raises:
            SeedError: it did not come in time, or as a whole.
        """
        key = (artifact.kind, artifact.name)
        received: Received | None = None
        started = time.monotonic()
        try:
            received = self._place(artifact)
            sink = self._sink(received)
            await self._client.fetch(self.seed, self._seed_key, artifact, sink, timeout_s=max(0.0, self._left_s()))
            received.finish()
            self._arrivals.add(received)
        except CacheError as error:
            _discard(received)
            self._arrivals.failed(f"refused: {error}", key)
            logger.info("caches: %s of seed %s was not taken: %s", artifact, self.seed, error)
        except BaseException:
            _discard(received)
            raise
        finally:
            self.seconds += time.monotonic() - started

    def _place(self, artifact: Artifact) -> Received:
        """A place for the bytes: memory for JSON, a private folder beside the caches for code. Raises CacheError."""
        if LEVELS[artifact.kind] == "safe":
            return Body(artifact)
        return Staged(self._root(artifact.kind), artifact)

    def _sink(self, received: Received) -> Callable[[bytes], None]:
        def sink(piece: bytes) -> None:
            received.write(piece)
            self.nbytes += len(piece)

        return sink

    def _left_s(self) -> float:
        return self._deadline - time.monotonic()


def _discard(received: Received | None) -> None:
    if received is not None:
        received.discard()
