"""The last forks of the fleet. Failures are kept longer than others: they are the reason to look back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from vllm_rfork.messages import CacheResults
from vllm_rfork.planner.store.base import Outcome
from vllm_rfork.planner.store.journal import Book, Journal
from vllm_rfork.planner.store.records import Lease

FAILED = ("failed", "expired")


@dataclass(frozen=True)
class PastFork:
    """One lease that ended. ``result`` is ``ok``, ``failed``, ``released`` (nothing reported) or ``expired``.

    ``duration_s`` is the duration of the fork as its receiver reported it. If it reported none it is that of the lease,
    which may be much longer, and ``of_lease`` is set.

    ``worker`` is the receiver's id as a pending loader, and ``caches`` its report once it is a seed itself.
    """

    key: str
    seed: str
    receiver: str
    result: str
    cause: str
    nbytes: int
    duration_s: float
    at: float
    of_lease: bool = False
    side: str = ""
    lane: str = ""
    worker: str = ""
    caches: CacheResults | None = None
    pod: str = ""

    @classmethod
    def of(cls, lease: Lease, now: float, result: str, outcome: Outcome | None) -> PastFork:
        """Return the lease that ends ``now``, with what its receiver reported."""
        report = outcome or Outcome(ok=False)
        return cls(
            key=lease.key,
            seed=lease.name,
            receiver=lease.who,
            result=result,
            cause=report.cause,
            nbytes=report.nbytes,
            duration_s=report.duration_s or round(now - lease.granted_at, 3),
            at=now,
            of_lease=not report.duration_s,
            side=report.side,
            lane=report.lane,
            worker=lease.worker,
            pod=lease.pod,
        )


class FailedFork(PastFork):
    """A fork that failed or expired, in the longer list."""


class _Last(deque[PastFork]):
    """The last ``maxlen`` of one list, the youngest last, also in the book ``kind``. Use ``append`` only."""

    def __init__(self, maxlen: int, kind: str, record_type: type[PastFork], journal: Journal | None) -> None:
        super().__init__(maxlen=maxlen)
        #: the same forks under running numbers
        self._book = Book(kind, record_type, journal, in_order=True)
        self._number = 0

    def append(self, past: PastFork) -> None:
        """Add ``past``, and forget the oldest if there are too many."""
        self.restore(self._number, past)

    def restore(self, number: int, past: PastFork) -> None:
        """Add ``past`` under the number that an earlier leader gave it; numbers must grow."""
        super().append(past)
        self._book[str(number)] = past
        self._number = number + 1
        while len(self._book) > len(self):
            del self._book[next(iter(self._book))]


class History(_Last):
    """The last ``maxlen`` past forks, and in ``failures`` the last ``maxlen`` that failed, the youngest last."""

    def __init__(self, maxlen: int, journal: Journal | None = None) -> None:
        super().__init__(maxlen, "past", PastFork, journal)
        self.failures = _Last(maxlen, "failure", FailedFork, journal)

    def append(self, past: PastFork) -> None:
        """Add ``past``; also to the failures if it is one."""
        super().append(past)
        if past.result in FAILED:
            self.failures.append(FailedFork(**vars(past)))

    def add_caches(self, worker: str, report: CacheResults) -> None:
        """Add the report of ``worker`` to its last fork that succeeded, if that is still here."""
        for place, name in enumerate(reversed(self._book), start=1):
            past = self[-place]
            if past.worker == worker and past.result == "ok":
                self[-place] = self._book[name] = replace(past, caches=report)
                return
