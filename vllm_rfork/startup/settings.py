"""Settings of one worker for its caches, and the bounds in time."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_rfork.caches.manifest import LEVELS, Level
from vllm_rfork.caches.safe.autotune_table import MAX_TABLE_NBYTES
from vllm_rfork.caches.safe.model_info import MAX_INFO_NBYTES
from vllm_rfork.caches.safe.startup_plan import MAX_PLAN_NBYTES
from vllm_rfork.config import Settings
from vllm_rfork.net.credentials import Credentials

#: Bound of a receiver's whole fetch, in seconds. A start that compiles takes longer.
FETCH_S = 60.0
#: Bound of a vote of all ranks, in seconds.
VOTE_S = 10.0
#: How long a seed waits for its directories to become quiet, in seconds.
QUIET_WITHIN_S = 120.0
#: Bytes of one JSON cache of each kind, which is kept in memory, and of all that are received from a seed.
JSON_NBYTES = {"startup_plan": MAX_PLAN_NBYTES, "autotune_table": MAX_TABLE_NBYTES, "model_info": MAX_INFO_NBYTES}
MAX_JSON_NBYTES = 32 * 1024 * 1024

#: The order in which kinds are fetched: by when a start reads them, and by what they save.
ORDER = (
    *("startup_plan", "autotune_table", "model_info"),
    *("torch_aot", "inductor", "split_graph", "triton"),
)


@dataclass(frozen=True)
class CacheSettings:
    """Settings of one worker.

    Attributes:
        level: ``rfork_caches``.
        offers: this worker may become a seed.
        request_timeout_s: bound of one short call.
    """

    level: Level
    offers: bool
    credentials: Credentials
    request_timeout_s: float

    @classmethod
    def of(cls, settings: Settings, credentials: Credentials) -> CacheSettings | None:
        """The settings of a worker; None if it carries no caches."""
        if settings.rfork_caches == "off":
            return None
        return cls(settings.rfork_caches, settings.rfork_become_seed, credentials, settings.rfork_request_timeout_sec)

    @property
    def taking_obstacle(self) -> str | None:
        """The reason why this worker takes no compiled code from a seed; None if it does."""
        return "rfork_caches is not code" if self.level != "code" else self.credentials.code_obstacle()

    @property
    def offering_obstacle(self) -> str | None:
        """The reason why this worker offers no compiled code as a seed; None if it does."""
        return "rfork_caches is not code" if self.level != "code" else self.credentials.code_serving_obstacle()

    def takes(self, kind: str) -> bool:
        """Return True if this worker takes caches of ``kind``."""
        return LEVELS[kind] == "safe" or self.taking_obstacle is None
