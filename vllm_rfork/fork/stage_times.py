"""Seconds that a load spends in each stage, for the log line of a fork and for the benchmark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class StageTimes:
    """Seconds by stage.

    Attributes:
        outside: stages that are not part of the fork's own seconds, with the reason: ``overlapped`` (on another
            thread, while the model was built) or ``before`` (the fork had not begun).
    """

    seconds: dict[str, float] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the block to ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def __str__(self) -> str:
        notes = {name: f" ({word})" for name, word in self.outside.items()}
        return ", ".join(f"{name} {value:.3f} s{notes.get(name, '')}" for name, value in self.seconds.items())
