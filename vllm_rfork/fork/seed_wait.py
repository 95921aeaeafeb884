"""One receiver's question for a seed: asked, waited for, and answered with a lease or with the reason for none.

The planner decides how long waiting is worth it and says so in every answer; this module asks again, tells the log,
and stops by itself where the planner does not. Must not import torch or vLLM.
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

#: A line in the log after each so many seconds of a wait; slices end a little earlier or later than this.
LOG_EVERY_S = 9.0
#: How often a waiting rank looks whether its instance still wants a seed, in seconds.
LOOK_EVERY_S = 0.5
#: The least time between two questions of a wait, in seconds, whatever a planner answers.
_LEAST_PAUSE_S = 0.2


@dataclass
class Question:
    """Asks a planner for a lease until it is given one or is told that there is none. Used once.

    Attributes:
        exclude: seeds that failed this receiver.
        intent, labels: see :meth:`PlannerClient.acquire`.
        wait_s: the longest wait in seconds, 0: none; None: as the planner decides.
        waited_before_s: what earlier questions of the same start have waited; the planner's bound is of them all.
        until: when to stop in any case, by ``clock``.
        given_up: why nobody needs the seed any more; empty while it is needed. None: nobody else decides that.
        waited_s: the time spent in the queue.
        left: this receiver has left the queue by itself, and the planner has not been told that it loads.
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
    given_up: Callable[[], str] | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    waited_s: float = 0.0
    left: bool = False
    _ticket: str = field(default_factory=lambda: uuid.uuid4().hex)
    _place: Waiting | None = None
    _told_at: float = 0.0

    def lease(self) -> Lease:
        """The lease on a seed, after a wait or at once.

        Raises:
            NoSeedAvailable: the planner has none, and waiting is not worth it, or not any more.
            PlannerError: no usable answer in time.
        """
        started_at = self.clock()
        while True:
            asked_at = self.clock()
            try:
                answer = self._asked(asked_at - started_at)
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
            self._tell(answer)
            if reason := self._over(answer):
                logger.info("stopped waiting for a seed after %.1f s: %s", self.waited_s, reason)
                raise self._no_longer(reason)
            if self._place is not None and self.clock() - asked_at < _LEAST_PAUSE_S:
                self.sleep(_LEAST_PAUSE_S)
            self._place = answer

    def _asked(self, waited_s: float) -> Lease | Waiting:
        in_queue = self._place is not None
        left_s = None if self.wait_s is None else max(0.0, self.wait_s - waited_s)
        answers: list[Lease | Waiting] = []
        errors: list[BaseException] = []

        async def asking() -> None:
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
            except Exception as error:  # noqa: BLE001 - it is raised again on the caller's thread
                errors.append(error)

        task = background().spawn(asking(), "rfork-question")
        deadline = self.clock() + self.planner.request_timeout_s + max(left_s or 0.0, SLICE_S) + 1.0
        look = self.given_up if in_queue else None
        while not task.done:
            left = deadline - self.clock()
            if left <= 0:
                raise PlannerError("the background thread of this process does not answer")
            try:
                task.wait(min(left, LOOK_EVERY_S) if look else left)
            except TimeoutError:
                if look and (reason := look()):
                    task.cancel(self.planner.request_timeout_s)  # hanging up gives the place in the queue back
                    raise self._no_longer(reason) from None
        if errors:
            raise errors[0]
        if not answers:
            raise PlannerError("the background thread of this process was stopped")
        return answers[0]

    def _tell(self, place: Waiting) -> None:
        """Say that the wait begins, and every ten seconds that it goes on."""
        now = self.clock()
        expected = "" if place.expected_s is None else f", {place.expected_s:.0f} s expected"
        reason = WAIT_REASONS.get(place.reason, place.reason or "no seed is free")
        if self._place is None:
            text = "waiting for a seed: position %d in the queue, at most %.0f s%s, because %s"
            logger.info(text, place.position, place.bound_s, expected, reason)
        elif now - self._told_at >= LOG_EVERY_S:
            text = "still waiting for a seed after %.0f s: position %d in the queue, at most %.0f s%s, because %s"
            logger.info(text, self.waited_s, place.position, place.bound_s, expected, reason)
        else:
            return
        self._told_at = now

    def _over(self, place: Waiting) -> str:
        """Why this receiver waits no longer, whatever the planner says; empty while it waits."""
        waited_s = self.waited_before_s + self.waited_s
        if waited_s > place.bound_s + SLICE_S or (self.waited_before_s and waited_s > place.bound_s):
            return f"it has waited {waited_s:.0f} s, and the planner's bound is {place.bound_s:.0f} s"
        if self.clock() >= self.until:
            return "rfork_fork_timeout_sec is over"
        return self.given_up() if self.given_up else ""

    def _no_longer(self, reason: str) -> NoSeedAvailable:
        """The error of a receiver that leaves the queue by itself, and loads."""
        self.left = True
        return NoSeedAvailable(f"no longer waiting for a seed of key {self.seed_key!r}: {reason}")
