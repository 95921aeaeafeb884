"""A worker's intent: the statement to the planner that it loads from storage and will be a seed; others wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

from vllm_rfork import messages
from vllm_rfork.clients import PlannerClient
from vllm_rfork.errors import PlannerError
from vllm_rfork.logs.worker import worker_logger
from vllm_rfork.net.event_loop import BackgroundTask, background

logger = worker_logger(__name__)

#: How long the planner remembers an intent that is not renewed, in seconds. Short, since receivers wait for the worker.
INTENT_TTL_S = messages.TICKET_INTENT_TTL_S
#: How long a start may block on withdrawing the intent, in seconds. The request continues in the background after that.
WITHDRAWAL_S = 1.0


class Intent:
    """The intent of one load.

    Args:
        wanted: false for a worker that will not be a seed: it states no intent.

    Attributes:
        id: sent with each question for a seed and with the announcement that fulfils it; empty: no intent is stated.
    """

    def __init__(self, planner: PlannerClient, seed_key: str, *, wanted: bool) -> None:
        self.id = uuid.uuid4().hex if wanted else ""
        self._planner = planner
        self._seed_key = seed_key
        self._renewal: BackgroundTask | None = None
        self._may_stand = False

    def sent(self) -> None:
        """Record that the planner is being sent the intent: it may stand whatever the answer is, even if none comes."""
        self._may_stand = bool(self.id)

    def dropped(self) -> None:
        """Record that the planner does not keep the intent."""
        self._may_stand = False

    def renew(self, fingerprint: str, *, stated: bool) -> None:
        """Renew the intent in the background until :meth:`stop_renewing`.

        Args:
            stated: the planner has just confirmed it; otherwise it is stated at once.
        """
        self._may_stand = True
        self._renewal = background().spawn(self._renew(fingerprint, stated=stated), "rfork-intent")

    async def _renew(self, fingerprint: str, *, stated: bool) -> None:
        while True:
            if stated:
                await asyncio.sleep(INTENT_TTL_S / 3)
            stated = True
            try:
                await self._planner.intend(self._seed_key, self.id, ttl_s=INTENT_TTL_S, fingerprint=fingerprint)
            except PlannerError as error:
                logger.debug("the intent could not be renewed: %s", error)

    def stop_renewing(self) -> None:
        """Stop renewing: the announcement fulfils the intent, or it expires. Idempotent."""
        if self._renewal is not None:
            try:
                self._renewal.cancel(self._planner.request_timeout_s)
            except TimeoutError as error:
                logger.debug("%s", error)
            self._renewal = None

    def withdraw(self) -> None:
        """Withdraw the intent, since this worker will not be a seed. Idempotent."""
        self.stop_renewing()
        intent, self.id = self.id, ""
        if self._may_stand:
            self._may_stand = False
            task = background().spawn(self._withdraw(intent), "rfork-intent")
            with contextlib.suppress(TimeoutError):  # wait, since the process may be about to exit
                task.wait(WITHDRAWAL_S)

    async def _withdraw(self, intent: str) -> None:
        try:
            await self._planner.intend(self._seed_key, intent, ttl_s=0.0)
        except PlannerError as error:
            logger.debug("the intent could not be withdrawn and will expire: %s", error)
