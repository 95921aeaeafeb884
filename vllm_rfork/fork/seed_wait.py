"""One receiver's request for a lease: sent, repeated while it waits in the queue, and ended with a lease or a reason.

The planner decides how long waiting is worthwhile and states it in every answer. The request stops by itself if the
planner exceeds its own bound.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_rfork.clients import PlannerClient
from vllm_rfork.errors import ForkError, NoSeedAvailable, PlannerError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.messages import SLICE_S, WAIT_REASONS, Lease, SeedAddress, Waiting
from vllm_rfork.net.event_loop import background

logger = worker_logger(__name__)

#: Seconds between two log lines of one wait; answers come a little earlier or later than this.
LOG_EVERY_S = 9.0
#: Seconds between two looks of a waiting rank at whether its instance still needs a seed.
LOOK_EVERY_S = 0.5
#: The shortest time between two requests of one wait, in seconds, whatever the planner answers.
_MIN_PAUSE_S = 0.2
_NO_ANSWER = "the background thread of this process does not answer"


@dataclass
class LeaseRequest:
    """Asks a planner for a lease until it grants one or has none. Used once.

    Attributes:
        exclude: seeds that failed this receiver.
        intent, labels: see :meth:`PlannerClient.acquire`.
        wait_s: the longest wait in seconds, 0: none; None: the planner decides.
        waited_before_s: the waits of earlier requests of the same start; the planner's bound covers all of them.
        until: when to stop in any case, by ``clock``.
        no_longer_needed: returns the reason why nobody needs the seed any more, if there is one.
        waited_s: the time spent in the queue.
        left: this receiver left the queue by itself, so the planner has not recorded that it loads from storage.
    """

    planner: PlannerClient
    seed_key: str
    fingerprint: str
    exclude: Sequence[SeedAddress] = ()
    intent: str = ""
    labels: str = ""
    wait_s: float | None = None
    waited_before_s: float = 0.0
    until: float = float("inf")
    no_longer_needed: Callable[[], str | None] | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    waited_s: float = 0.0
    left: bool = False
    _ticket: str = field(default_factory=lambda: uuid.uuid4().hex)
    _place: Waiting | None = None
    _logged_at: float = 0.0

    def lease(self) -> Lease:
        """The lease on a seed, at once or after a wait.

        Raises:
            NoSeedAvailable: the planner has none, and waiting is not worthwhile, or no longer.
            PlannerError: no usable answer in time.
        """
        started_at = self.clock()
        while True:
            asked_at = self.clock()
            try:
                answer = self._ask(asked_at - started_at)
            except ForkError as error:
                self.waited_s = self.clock() - started_at
                if self._place is not None:
                    logger.info("stopped waiting for a seed after %.1f s: %s", self.waited_s, str(error))
                raise
            self.waited_s = self.clock() - started_at
            if isinstance(answer, Lease):
                if self._place is not None:
                    logger.info("seed %s is free, after a wait of %.1f s", answer.seed, self.waited_s)
                return answer
            self._log(answer)
            if reason := self._stop_reason(answer):
                logger.info("stopped waiting for a seed after %.1f s: %s", self.waited_s, reason)
                raise self._leave(reason)
            if self._place is not None and self.clock() - asked_at < _MIN_PAUSE_S:
                self.sleep(_MIN_PAUSE_S)
            self._place = answer

    def _ask(self, waited_s: float) -> Lease | Waiting:
        """One request to the planner; given up when the instance needs no seed any more."""
        in_queue = self._place is not None
        left_s = None if self.wait_s is None else max(0.0, self.wait_s - waited_s)
        answers: list[Lease | Waiting] = []
        errors: list[BaseException] = []

        async def ask() -> None:
            try:
                answers.append(
                    await self.planner.ask(
                        self.seed_key,
                        self._ticket,
                        fingerprint=self.fingerprint,
                        wait_s=left_s,
                        in_queue=in_queue,
                        exclude=self.exclude,
                        intent=self.intent,
                        labels=self.labels,
                    )
                )
            except Exception as error:  # noqa: BLE001 - raised again on the caller's thread
                errors.append(error)

        task = background().spawn(ask(), "rfork-lease-request")
        deadline = self.clock() + self.planner.request_timeout_s + max(left_s or 0.0, SLICE_S) + 1.0
        look = self.no_longer_needed if in_queue else None
        while not task.done:
            left = deadline - self.clock()
            if left <= 0:
                raise PlannerError(_NO_ANSWER)
            try:
                task.wait(min(left, LOOK_EVERY_S) if look else left)
            except TimeoutError:
                if look and (reason := look()):
                    task.cancel(self.planner.request_timeout_s)  # a closed connection gives up the place in the queue
                    raise self._leave(reason) from None
        if errors:
            raise errors[0]
        if not answers:
            raise PlannerError("the background thread of this process was stopped")
        return answers[0]

    def _log(self, place: Waiting) -> None:
        """Log that the wait begins, and every ten seconds that it continues."""
        now = self.clock()
        expected = "" if place.expected_s is None else f", {place.expected_s:.0f} s expected"
        reason = WAIT_REASONS.get(place.reason, place.reason or "no seed is free")
        if self._place is None:
            text = "waiting for a seed: position %d in the queue, at most %.0f s%s, because %s"
            logger.info(text, place.position, place.bound_s, expected, reason)
        elif now - self._logged_at >= LOG_EVERY_S:
            text = "still waiting for a seed after %.0f s: position %d in the queue, at most %.0f s%s, because %s"
            logger.info(text, self.waited_s, place.position, place.bound_s, expected, reason)
        else:
            return
        self._logged_at = now

    def _stop_reason(self, place: Waiting) -> str | None:
        """The reason to stop waiting, whatever the planner answers; None to go on."""
        waited_s = self.waited_before_s + self.waited_s
        if waited_s > place.bound_s + SLICE_S or (self.waited_before_s and waited_s > place.bound_s):
            return f"it has waited {waited_s:.0f} s, and the planner's bound is {place.bound_s:.0f} s"
        if self.clock() >= self.until:
            return "rfork_fork_timeout_sec is over"
        return self.no_longer_needed() if self.no_longer_needed else None

    def _leave(self, reason: str) -> NoSeedAvailable:
        """The error of a receiver that leaves the queue by itself and loads from storage."""
        self.left = True
        return NoSeedAvailable(f"no longer waiting for a seed of key {self.seed_key!r}: {reason}")
