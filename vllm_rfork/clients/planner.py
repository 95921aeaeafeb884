"""Client of a planner, as receivers, seeds and the command line use it.

It works with every legacy planner: what such a planner does not know it ignores, or answers with 404 or 405, which is
an :class:`Outcome` here and not an error.
"""

from __future__ import annotations

from typing import Any

from vllm_rfork import messages
from vllm_rfork.clients.answers import json_object
from vllm_rfork.clients.calls import MAX_JSON_NBYTES
from vllm_rfork.clients.receiver_calls import ReceiverCalls
from vllm_rfork.clients.seed_calls import SeedCalls


class PlannerClient(ReceiverCalls, SeedCalls):
    """All calls to one planner. Arguments as for :class:`~vllm_rfork.clients.calls.PlannerCalls`."""

    async def healthz(self) -> dict[str, Any]:
        """The planner's report of its health.

        Raises:
            PlannerError: not healthy, or no usable answer in time.
        """
        return json_object(await self.call("GET", messages.HEALTHZ, {}, max_body_nbytes=MAX_JSON_NBYTES))

    async def snapshot(self) -> dict[str, Any]:
        """The planner's whole state as JSON; its form is the planner's own.

        Raises:
            PlannerError: no usable answer in time.
        """
        return json_object(await self.call("GET", messages.DEBUG_SNAPSHOT, {}, max_body_nbytes=MAX_JSON_NBYTES))
