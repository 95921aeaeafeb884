"""Pauses between two looks at a request.

A look costs processor time: UCX makes progress inside it. It is needed all the same, because the copies of some
transports continue only when somebody looks. So the pauses grow with the time that the request is expected to take.
"""

from __future__ import annotations

SHORTEST_S = 0.00005
#: An engine that is closed, and a deadline, are noticed within one pause.
LONGEST_S = 0.02
#: The speed of fewer bytes says nothing about that of many.
MEASURED_NBYTES = 16 * 1024 * 1024
#: The part of the expected time after which a request may be done.
_EARLIEST = 0.8


class Pace:
    """The pauses for one peer, learned from its last large request. Not thread-safe."""

    def __init__(self) -> None:
        self._bytes_per_s: float | None = None

    def pause_s(self, nbytes: int, elapsed_s: float) -> float:
        """Seconds to wait for a request of ``nbytes`` that was started ``elapsed_s`` seconds ago.

        Sixteen looks at most until it may be done; then one for each 64th of the time that has passed, which is how
        late its end may be noticed. Without experience one for each eighth.
        """
        if self._bytes_per_s is None:
            pause_s = elapsed_s / 8
        else:
            expected_s = nbytes / self._bytes_per_s
            early_s = _EARLIEST * expected_s - elapsed_s
            pause_s = min(expected_s / 16, early_s) if early_s > 0 else elapsed_s / 64
        return min(max(pause_s, SHORTEST_S), LONGEST_S)

    def learn(self, nbytes: int, elapsed_s: float) -> None:
        """Take note that a request of ``nbytes`` took ``elapsed_s`` seconds."""
        if nbytes >= MEASURED_NBYTES and elapsed_s > 0:
            self._bytes_per_s = nbytes / elapsed_s
