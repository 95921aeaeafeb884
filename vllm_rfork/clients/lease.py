"""Keeps a lease alive while its receiver reads, and knows when it is lost.

Renewal runs in the event loop, the read in another thread: the reader asks :meth:`LeaseKeeper.check` between
batches. Must not release the lease; whoever acquired it does, after the keeper was stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from vllm_rfork.clients.answers import Outcome
from vllm_rfork.clients.receiver_calls import ReceiverCalls
from vllm_rfork.errors import PlannerError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import Lease

logger = worker_logger(__name__)

#: A lease is renewed when this share of its TTL has passed, so that two renewals may fail.
_RENEW_AFTER = 1 / 3
#: An unconfirmed lease is renewed at once, and again after so many seconds where that failed.
_CONFIRM_AGAIN_S = 1.0


class LeaseKeeper:
    """Renews one lease; make it as soon as the lease is there.

    Args:
        client: of the planner that gave the lease.
        lease: a lease without a TTL never expires and is never renewed.
        clock, sleep: replaced in tests.
    """

    def __init__(
        self,
        client: ReceiverCalls,
        lease: Lease,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.lease = lease
        self._client = client
        self._clock = clock
        self._sleep = sleep
        self._expires_at = self._expiry(clock())
        self._problem = ""
        self._lost: PlannerError | None = None
        self._renewing: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Raise where the lease is gone; callable from any thread, never blocks.

        It goes by the clock too: an engine that holds the interpreter lock keeps :meth:`run` from noticing.

        Raises:
            PlannerError: the planner took the lease back, or it was not renewed in time; ``mutated`` is left to
                the caller, who knows what it has read.
        """
        if self._lost is not None:
            raise PlannerError(str(self._lost)) from self._lost
        if self._clock() >= self._expires_at:
            raise self._expired()

    async def start(self) -> None:
        """Begin to renew, on the loop that this runs on."""
        self._renewing = asyncio.create_task(self.run(), name=f"renewal of the lease on {self.lease.seed}")

    async def stop(self) -> None:
        """End renewal, also one that is under way, so that none follows the release. Stopping twice does nothing."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})

    async def run(self) -> None:
        """Renew until cancelled or lost; returns at once where nothing expires. Raises nothing: see :meth:`check`."""
        ttl_s = self.lease.ttl_s
        if ttl_s is None:
            return
        renewed_before, pause_s = False, 0.0 if self.lease.unconfirmed else ttl_s * _RENEW_AFTER
        while self._clock() < self._expires_at:
            if pause_s:
                await self._sleep(min(pause_s, max(0.0, self._expires_at - self._clock())))
            pause_s = ttl_s * _RENEW_AFTER if renewed_before or not self.lease.unconfirmed else _CONFIRM_AGAIN_S
            asked_at = self._clock()
            try:
                outcome = await self._client.renew(self.lease)
            except PlannerError as error:
                self._note(str(error))
                continue
            if outcome is Outcome.DONE:
                # Counted from before the call: the planner may have counted from any time since.
                self._expires_at = self._expiry(asked_at)
                self._problem = ""
                renewed_before, pause_s = True, ttl_s * _RENEW_AFTER
            elif renewed_before or await self._planner_renews():
                self._lose(PlannerError(f"the planner took the lease on seed {self.lease.seed} back while it was used"))
                return
            else:
                self._note(f"the planner gives leases of {ttl_s:g} s and has no call to renew them")
                return  # good for its one TTL; check() goes by the clock
        self._lose(self._expired())

    async def _planner_renews(self) -> bool:
        """Whether a 404 for the lease can be believed: it is also what a planner without the call answers."""
        try:
            return await self._client.renews_leases()
        except PlannerError:
            return True

    def _expiry(self, now: float) -> float:
        return float("inf") if self.lease.ttl_s is None else now + self.lease.ttl_s

    def _expired(self) -> PlannerError:
        reason = f": {self._problem}" if self._problem else ""
        return PlannerError(f"the lease on seed {self.lease.seed} expired while it was used{reason}")

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            logger.warning("the lease on seed %s could not be renewed: %s", self.lease.seed, problem)
        self._problem = problem

    def _lose(self, error: PlannerError) -> None:
        logger.warning("%s", error)
        self._lost = error
