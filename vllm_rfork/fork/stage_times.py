"""Seconds that a load spends in each stage, for the log line of a fork, metrics, traces, and the benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

#: Every name of a stage; metrics have a series for each.
STAGES = frozenset(
    {
        *("planner", "first metadata", "metadata", "pairing", "engine", "engine wait", "registration", "connect"),
        *("epoch", "read", "verify", "state", "digest"),
    }
)


@dataclass
class StageTimes:
    """Seconds by stage.

    Attributes:
        intervals: name, beginning and end of each run of a stage, in nanoseconds since the epoch.
        outside: stages that are not part of the fork's own seconds, with the reason: ``overlapped`` (on another
            thread, while the model was built) or ``before`` (the fork had not begun).
    """

    seconds: dict[str, float] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    intervals: list[tuple[str, int, int]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the block to ``name``."""
        started, started_ns = time.perf_counter(), time.time_ns()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.intervals.append((name, started_ns, time.time_ns()))

    def __str__(self) -> str:
        notes = {name: f" ({word})" for name, word in self.outside.items()}
        return ", ".join(f"{name} {value:.3f} s{notes.get(name, '')}" for name, value in self.seconds.items())
