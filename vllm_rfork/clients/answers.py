"""Interpretation of a planner's answers."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_rfork import messages
from vllm_rfork.errors import NoSeedAvailable, PlannerError
from vllm_rfork.net.client import Answer

#: What each of ``messages.MISSES`` means, for the log.
_MISS_TEXTS = {
    "": "",
    "none": " (none: no seed has it yet)",
    "busy": " (busy: no seed has a free slot now)",
    "quarantined": " (quarantined: every seed failed other receivers; the planner's log lists the causes)",
    "fingerprint": " (fingerprint: the seeds of this key were built with other versions, settings or a checkpoint)",
    "excluded": " (excluded: every seed failed this worker before)",
}
#: Statuses with which a planner sends ``Retry-After``.
_TEMPORARY = frozenset({429, 503})
#: Shortest pause in seconds, for a planner that sends 0.
_SHORTEST_PAUSE_S = 0.2


class Outcome(enum.Enum):
    """The result of a call that a planner may decline without an error."""

    DONE = "done"
    #: The planner has no such seed or lease or, if it is a legacy planner, no such call.
    UNKNOWN = "unknown"
    #: ``remove_seed`` of a leased seed: no new leases, and the seed goes when the last one ends.
    DRAINING = "draining"


class Attendance(enum.Enum):
    """A planner's answer to a presence request."""

    #: Send the next request at once.
    AGAIN = "again"
    #: The planner does not know the seed: announce it, then send the next request.
    NOT_KNOWN = "not known"
    #: The planner holds as many requests as it may: the seed depends on its heartbeats.
    FULL = "full"
    #: The planner does not have this call.
    NO_SUCH_CALL = "no such call"


@dataclass(frozen=True)
class Attended:
    """The end of a presence request. ``retry_after_s`` is the pause that the planner asks for, if it does."""

    answer: Attendance
    retry_after_s: float | None = None


def retry_after_s(answer: Answer) -> float | None:
    """The pause in seconds that the planner asks for; None unless it sends a number of seconds with 429 or 503."""
    text = answer.headers.get("Retry-After", "").strip()
    if answer.status not in _TEMPORARY or not re.fullmatch(r"[0-9]{1,6}", text):
        return None
    return max(float(text), _SHORTEST_PAUSE_S)


def refusal(answer: Answer) -> PlannerError:
    """The error for an answer that is not one of a call's results."""
    return PlannerError(f"planner {answer.url} answered {answer}")


def json_object(answer: Answer) -> dict[str, Any]:
    """The JSON object in ``answer``.

    Raises:
        PlannerError: any other content, or a status other than 200.
    """
    if answer.status != 200:
        raise refusal(answer)
    try:
        return msgspec.json.decode(answer.body, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PlannerError(f"planner {answer.url} did not answer with a JSON object: {error}") from error


def outcome(answer: Answer, *, unknown: tuple[int, ...] = ()) -> Outcome:
    """``DONE`` for 200, ``UNKNOWN`` for a status in ``unknown``.

    Raises:
        PlannerError: any other status.
    """
    if answer.status == 200:
        return Outcome.DONE
    if answer.status in unknown:
        return Outcome.UNKNOWN
    raise refusal(answer)


def miss(seed_key: str, answer: Answer, *, quote: bool) -> NoSeedAvailable:
    """The error for a 404 to ``get_seed``. ``quote`` adds the planner's text."""
    reason = messages.header(answer.headers, messages.MISS) or ""
    reason = reason if reason in _MISS_TEXTS else ""
    problem = f"the planner has no free seed for key {seed_key!r}{_MISS_TEXTS[reason]}"
    if quote and answer.body:
        problem += f": {answer.text}"
    return NoSeedAvailable(
        problem,
        intent_granted=messages.header(answer.headers, messages.INTENT) == messages.INTENT_GRANTED,
        reason=reason,
        others=messages.other_fingerprints(answer.headers),
    )
