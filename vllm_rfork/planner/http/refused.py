"""Answers other than 200."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from vllm_rfork.messages import BadMessage
from vllm_rfork.planner.store.errors import LimitReached, StillLeased, StoreUnavailable, UnknownLease, UnknownSeed
from vllm_rfork.planner.wait_queue import Closing


class Refused(Exception):
    """An answer other than 200, with a text for people."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


#: The status of each exception that a call may raise.
STATUSES: Mapping[type[Exception], int] = {
    BadMessage: 400,
    UnknownLease: 404,
    UnknownSeed: 404,
    StillLeased: 409,
    LimitReached: 429,
    StoreUnavailable: 503,
    Closing: 503,
}


def refusal(error: Exception) -> web.Response | None:
    """Return the answer for an exception that a call raised; None if it is a bug."""
    if isinstance(error, Refused):
        return web.Response(status=error.status, text=f"{error}\n", headers=error.headers)
    status = next((each for kind, each in STATUSES.items() if isinstance(error, kind)), None)
    if status is None:
        return None
    headers = {"Retry-After": "1"} if status == 503 else None
    return web.Response(status=status, text=f"{str(error) or 'the planner is being stopped'}\n", headers=headers)
