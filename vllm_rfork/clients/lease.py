"""Renewal of a lease while its receiver reads.

Renewal runs in the event loop, the read in another thread, which calls :meth:`LeaseKeeper.check` between batches. The
caller releases the lease after it has stopped the keeper.
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

#: The share of its TTL after which a lease is renewed, so that two renewals may fail.
_RENEW_AFTER = 1 / 3
#: Seconds between two attempts to renew an unconfirmed lease for the first time.
_CONFIRM_AGAIN_S = 1.0


class LeaseKeeper:
    """Renews one lease. Its TTL counts from the construction of this object.

    Args:
        client: of the planner that granted the lease.
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
        """Raise if the lease is lost; callable from any thread, never blocks.

        It also checks the clock, because an engine that holds the interpreter lock delays :meth:`run`.

        Raises:
            PlannerError: the planner ended the lease, or it was not renewed in time.
        """
        if self._lost is not None:
            raise PlannerError(str(self._lost)) from self._lost
        if self._clock() >= self._expires_at:
            raise self._expired()

    async def start(self) -> None:
        """Begin to renew, on the current event loop."""
        self._renewing = asyncio.create_task(self.run(), name=f"renewal of the lease on {self.lease.seed}")

    async def stop(self) -> None:
        """End renewal, including a call that is in progress, so that none follows the release. Idempotent."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.wait({self._renewing})

    async def run(self) -> None:
        """Renew until cancelled or lost; returns at once if the lease never expires. Errors appear in :meth:`check`."""
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
                # From before the call: the planner's TTL may have started at any time since.
                self._expires_at = self._expiry(asked_at)
                self._problem = ""
                renewed_before, pause_s = True, ttl_s * _RENEW_AFTER
            elif renewed_before or await self._planner_renews():
                self._lose(PlannerError(f"the planner ended the lease on seed {self.lease.seed} while it was in use"))
                return
            else:
                self._note(f"the planner grants leases of {ttl_s:g} s and has no call to renew them")
                return  # valid for its one TTL; check() compares the clock
        self._lose(self._expired())

    async def _planner_renews(self) -> bool:
        """Check if a 404 means that the lease is gone: a planner without the call answers 404 too."""
        try:
            return await self._client.renews_leases()
        except PlannerError:
            return True

    def _expiry(self, now: float) -> float:
        return float("inf") if self.lease.ttl_s is None else now + self.lease.ttl_s

    def _expired(self) -> PlannerError:
        reason = f": {self._problem}" if self._problem else ""
        return PlannerError(f"the lease on seed {self.lease.seed} expired while it was in use{reason}")

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            logger.warning("the lease on seed %s could not be renewed: %s", self.lease.seed, problem)
        self._problem = problem

    def _lose(self, error: PlannerError) -> None:
        logger.warning("%s", error)
        self._lost = error
