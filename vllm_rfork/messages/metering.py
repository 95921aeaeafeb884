"""Headers from which metrics are made. Either side may omit them, and no decision depends on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_rfork.messages.values import BadMessage, encode_text, header, integer, seconds

#: ``add_seed``, ``get_seed`` and ``rfork_intent``: the model and the strategy behind the seed key.
MODEL = "RFORK-MODEL"
STRATEGY = "RFORK-STRATEGY"
#: Characters of each of them. A longer one is cut by its sender.
MAX_LABEL_LENGTH = 255
#: Answer to ``add_seed``: what receivers reported of their forks from this seed; see :class:`Served`.
SERVED = "RFORK-SERVED"
#: ``get_seed``, in a 200: seconds that a load of this key from storage took, as the planner measured it.
STORAGE_SEC = "RFORK-STORAGE-SEC"
#: Longest such load in seconds.
MAX_STORAGE_S = 86_400.0


@dataclass(frozen=True)
class Served:
    """Forks from one seed in its present epoch that succeeded, as their receivers reported them to the planner."""

    forks: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.forks},{self.nbytes}"


def parse_served(text: str) -> Served:
    """The inverse of ``str(Served)``.

    Raises:
        BadMessage: not two integers of at most 16 digits.
    """
    forks, _, nbytes = text.partition(",")
    bound = 10**16 - 1
    return Served(
        integer(forks.strip(), SERVED, minimum=0, maximum=bound),
        integer(nbytes.strip(), SERVED, minimum=0, maximum=bound),
    )


def served(headers: Mapping[str, str]) -> Served | None:
    """The value of :data:`SERVED`; None if it is missing or unusable."""
    try:
        return parse_served(header(headers, SERVED) or "")
    except BadMessage:
        return None


def storage_s(headers: Mapping[str, str]) -> float | None:
    """The value of :data:`STORAGE_SEC` in seconds; None if it is missing or unusable."""
    try:
        return seconds(header(headers, STORAGE_SEC) or "", STORAGE_SEC, maximum=MAX_STORAGE_S)
    except BadMessage:
        return None


def names(model: str, strategy: str) -> dict[str, str]:
    """The headers that name a model and a strategy, without those whose value is empty."""
    given = {MODEL: model[:MAX_LABEL_LENGTH], STRATEGY: strategy[:MAX_LABEL_LENGTH]}
    return {name: encode_text(text) for name, text in given.items() if text}
