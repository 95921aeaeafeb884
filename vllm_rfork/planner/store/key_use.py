"""The use of one key: its names for people, and the results of its receivers. It outlives the key's seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_rfork.planner.store.journal import Record


class KeyNames(NamedTuple):
    """Model and strategy behind a key, as workers send them; both are empty if none did."""

    model: str = ""
    strategy: str = ""


#: The worker sent no names.
UNNAMED = KeyNames()


@dataclass(slots=True)
class KeyUse(Record):
    """The names of a key, and its receivers since the planner first saw it.

    Attributes:
        forked: forks that succeeded, or whose receiver reported nothing.
        loaded: receivers that were sent to storage.
        saved_s: by how much the forks were shorter than the measured load from storage, in seconds.
    """

    model: str = ""
    strategy: str = ""
    forked: int = 0
    loaded: int = 0
    saved_s: float = 0.0

    @property
    def names(self) -> KeyNames:
        """Model and strategy."""
        return KeyNames(self.model, self.strategy)

    def name(self, names: KeyNames) -> None:
        """Set the names."""
        self.model, self.strategy = names

    def add_fork(self, reported_s: float, load_s: float) -> float:
        """Count a fork, and return the seconds that it saved.

        Args:
            reported_s: duration by the receiver's report; 0: unknown.
            load_s: the measured time of a load; 0: unknown.
        """
        saved_s = max(0.0, load_s - reported_s) if reported_s and load_s else 0.0
        self.forked += 1
        self.saved_s += saved_s
        return saved_s
