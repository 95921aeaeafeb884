"""The leases of one fork session: acquired, renewed, released with a report, without the seeds that failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_rfork import messages
from vllm_rfork.clients import LeaseKeeper, PlannerClient
from vllm_rfork.config import Settings
from vllm_rfork.errors import ForkError, NoSeedAvailable, PlannerError
from vllm_rfork.fork.intent import Intent
from vllm_rfork.fork.seed_wait import LeaseRequest
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import Lease, OtherSeeds, SeedAddress
from vllm_rfork.net.event_loop import background

logger = worker_logger(__name__)


@dataclass(frozen=True)
class HeldLease:
    """A lease, and its renewal."""

    lease: Lease
    keeper: LeaseKeeper

    @property
    def seed(self) -> SeedAddress:
        """The seed that may be read."""
        return self.lease.seed


@dataclass
class Usage:
    """The report on one use of a lease, sent to the planner with its release.

    Attributes:
        since: the beginning of the use (``time.monotonic``); the lease may have been granted long before.
        nbytes: bytes copied.
        lane: see :meth:`~vllm_rfork.engines.base.TransferEngine.lane`.
    """

    since: float
    nbytes: int = 0
    lane: str = ""

    def report(self, error: BaseException | None) -> dict[str, Any]:
        """The arguments of :meth:`PlannerClient.release` for a use that ended with ``error``, or well."""
        report: dict[str, Any] = {
            "result": messages.RESULT_OK if error is None else messages.RESULT_FAILED,
            "nbytes": self.nbytes,
            "seconds": time.monotonic() - self.since,
            "lane": self.lane,
        }
        if error is not None:
            # An error that is not a ForkError comes from this process: the seed is not to blame.
            side = error.side if isinstance(error, ForkError) else "receiver"
            report |= {"cause": type(error).__name__, "side": side}
        return report


class Leases:
    """See the module's docstring.

    Args:
        labels: this worker's labels, for the planner's choice of a seed.
        warn_of_others: called with the seeds of the key that have other fingerprints.

    Attributes:
        failed: the seeds that failed this receiver; the planner is asked for others.
        no_longer_needed: returns the reason why this instance needs no seed any more, if there is one. Asked while
            waiting in the planner's queue.
    """

    def __init__(
        self,
        settings: Settings,
        planner: PlannerClient,
        seed_key: str,
        intent: Intent,
        *,
        labels: str,
        warn_of_others: Callable[[Sequence[OtherSeeds]], None],
    ) -> None:
        self.failed: list[SeedAddress] = []
        self.no_longer_needed: Callable[[], str | None] | None = None
        self._settings = settings
        self._planner = planner
        self._seed_key = seed_key
        self._intent = intent
        self._labels = labels
        self._warn_of_others = warn_of_others
        self._waited_s = 0.0  # for seeds, in all

    def acquire(self, fingerprint: str, deadline: float) -> HeldLease:
        """A lease that is being renewed.

        Args:
            deadline: of the whole fork, by ``time.monotonic``.

        Raises:
            NoSeedAvailable: the planner has no seed.
            PlannerError: it cannot be asked; or it granted a seed again that has failed.
        """
        lease = self._request(fingerprint, deadline)
        held = HeldLease(lease, LeaseKeeper(self._planner, lease))
        if lease.seed in self.failed:
            self.release(held)
            raise PlannerError(
                f"the planner granted seed {lease.seed} again, which has failed: it does not support RFORK-EXCLUDE"
            )
        try:
            background().call(held.keeper.start(), self._settings.rfork_request_timeout_sec)
        except TimeoutError as error:
            self.release(held)
            raise PlannerError("the background thread of this process does not answer") from error
        return held

    def _request(self, fingerprint: str, deadline: float) -> Lease:
        wait_s = self._settings.rfork_seed_wait_sec
        request = LeaseRequest(
            self._planner,
            self._seed_key,
            fingerprint,
            exclude=list(self.failed),
            intent=self._intent.id,
            labels=self._labels,
            wait_s=wait_s,
            waited_before_s=self._waited_s,
            until=max(deadline, time.monotonic() + (wait_s or 0.0)),
            no_longer_needed=self.no_longer_needed,
        )
        self._intent.sent()
        try:
            lease = request.lease()
        except NoSeedAvailable as error:
            if error.reason in ("", "fingerprint"):  # with any other reason, seeds like this worker exist
                self._warn_of_others(error.others)
            if error.intent_granted or (request.left and self._intent.id):
                self._intent.renew(fingerprint, stated=error.intent_granted)
            else:
                self._intent.dropped()
            raise
        finally:
            self._waited_s += request.waited_s
        self._intent.dropped()
        return lease

    def release(self, held: HeldLease, usage: Usage | None = None, error: BaseException | None = None) -> None:
        """Stop renewing and release, in the background.

        Args:
            usage: None for a lease that was not used.
            error: how the use failed.
        """
        report = {} if usage is None else usage.report(error)
        background().spawn(self._release(held, report), "rfork-release")

    async def _release(self, held: HeldLease, report: dict[str, Any]) -> None:
        await held.keeper.stop()  # first, so that no renewal follows the release
        try:
            await self._planner.release(held.lease, **report)
        except PlannerError as error:
            logger.warning("the lease on seed %s could not be released: %s", held.seed, error)
