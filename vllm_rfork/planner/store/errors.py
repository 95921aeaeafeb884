"""The errors with which a store declines a call, each with the status of its answer."""

from __future__ import annotations

from vllm_rfork.errors import RForkError


class StoreError(RForkError):
    """Base of the errors with which a store declines a call."""


class UnknownLease(StoreError):
    """No such lease: released, expired, dropped with its seed, or never granted. HTTP 404."""


class UnknownSeed(StoreError):
    """No such seed under that key. HTTP 404."""


class StillLeased(StoreError):
    """The seed has leases; it is draining and gets no new one. HTTP 409."""


class LimitReached(StoreError):
    """A limit on keys, seeds, intents or drains is reached. HTTP 429."""


#: Redis does not answer as it should; another replica leads, or none yet; this replica led until another took over.
UNREACHABLE, NOT_LEADER, FENCED = "unreachable", "not_leader", "fenced"


class StoreUnavailable(StoreError):
    """This process cannot decide now: Redis is unreachable, or another replica leads. HTTP 503.

    Attributes:
        reason: :data:`UNREACHABLE`, :data:`NOT_LEADER` or :data:`FENCED`, for metrics.
    """

    def __init__(self, text: str, reason: str = UNREACHABLE) -> None:
        super().__init__(text)
        self.reason = reason

    def again(self) -> StoreUnavailable:
        """The same error for another caller: an object that is raised often keeps the frames of all its callers."""
        return StoreUnavailable(str(self), self.reason)
