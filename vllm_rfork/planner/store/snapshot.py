"""The store's state as plain JSON data for people: snapshot and history.

Lease ids are shortened: a whole one is the right to release the lease.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_rfork.messages import CacheResults
from vllm_rfork.messages.cache_results import HIT
from vllm_rfork.planner.store.base import Outcome
from vllm_rfork.planner.store.journal import Book, Journal

if TYPE_CHECKING:
    from vllm_rfork.planner.store.estimates import KeyTimes
    from vllm_rfork.planner.store.fleet_state import FleetState
    from vllm_rfork.planner.store.records import Lease, Seed, Waiter

_SHOWN = 4


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
        )


class History(deque[PastFork]):
    """The last ``maxlen`` past forks, the youngest last. Use ``append`` only."""

    def __init__(self, maxlen: int, journal: Journal | None = None) -> None:
        super().__init__(maxlen=maxlen)
        #: the same forks under running numbers
        self._book = Book("past", PastFork, journal, in_order=True)
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

    def add_caches(self, worker: str, report: CacheResults) -> None:
        """Add the report of ``worker`` to its last fork that succeeded, if that is still here."""
        for place, name in enumerate(reversed(self._book), start=1):
            past = self[-place]
            if past.worker == worker and past.result == "ok":
                self[-place] = self._book[name] = replace(past, caches=report)
                return


def past_fork(entry: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return ``entry`` (the fields of :class:`PastFork`) for people, with its age and rate instead of its time."""
    rate = entry["nbytes"] / entry["duration_s"] / 1e9 if entry["nbytes"] and entry["duration_s"] else None
    shown = {name: value for name, value in entry.items() if name not in ("at", "worker")}
    shown["caches"] = caches_entry(entry["caches"])
    return shown | {"ago_s": round(now - entry["at"], 1), "gb_per_s": rate and round(rate, 3)}


def caches_entry(report: CacheResults | None) -> dict[str, Any] | None:
    """Return the report of a start as plain data, for people."""
    if report is None:
        return None
    hits = [kind for kind, result in report.kinds.items() if result == HIT]
    misses = {kind: reason for kind, reason in report.kinds.items() if reason != HIT}
    return {"hits": hits, "misses": misses, "saved_s": report.saved_s}


def lease_id(user_id: str) -> str:
    """Return enough of a lease id to distinguish two, and too little to release one."""
    return user_id.rpartition(".")[2][:_SHOWN] + "…"


def snapshot_head(fleet: FleetState) -> dict[str, Any]:
    """Return the fields of a snapshot about the whole fleet."""
    return {
        "state": fleet.state_id,
        "age_s": round(fleet.now - fleet.born_at, 1),
        "policy": fleet.rules.policy.name,
    }


def times_entry(times: KeyTimes) -> dict[str, Any]:
    """Return the measured times of one key, for people."""
    return {name: round(value, 3) for name, value in asdict(times).items()}


def snapshot_lists(
    fleet: FleetState, history: Sequence[PastFork], *, key: str | None, limit: int
) -> Iterator[tuple[str, list[Any], Callable[[Any, float], Any]]]:
    """Yield each list of a snapshot: its name, at most ``limit`` records, and the function that makes an entry."""
    shown = list(fleet.keys.values()) if key is None else [each for each in (fleet.keys.get(key),) if each]
    leases: Iterable[Lease] = fleet.leases.values()  # of seeds that are unknown as well
    if key is not None:
        leases = (lease for key_state in shown for lease in key_state.leases.values())
    found: dict[str, tuple[Iterable[Any], Callable[[Any, float], Any]]] = {
        "seeds": ((seed for key_state in shown for seed in key_state.seeds.values()), seed_entry),
        "leases": (leases, lease_entry),
        "waiting": (
            (pair for key_state in shown for pair in enumerate(key_state.waiters(), start=1)),
            lambda pair, now: waiter_entry(pair[0], pair[1], now),
        ),
        "intents": (
            ((key_state.key, each, print_) for key_state in shown for each, print_ in key_state.intents.items()),
            lambda intent, _: dict(zip(("key", "intent", "fingerprint"), intent, strict=True)),
        ),
        "times": (
            (pair for pair in fleet.times.items() if key is None or pair[0] == key),
            lambda pair, _: {"key": pair[0], **times_entry(pair[1])},
        ),
        "history": (
            (each for each in reversed(history) if key is None or each.key == key),
            lambda past, now: past_fork(vars(past), now),
        ),
    }
    yield "keys", shown[:limit], lambda key_state, now: (key_state.key, asdict(key_state.totals(now)))
    for name, (records, entry) in found.items():
        yield name, list(itertools.islice(records, limit)), entry


def seed_entry(seed: Seed, now: float) -> dict[str, Any]:
    """Return one seed, for people."""
    return {
        "key": seed.key,
        "seed": seed.name,
        "ip": seed.address.host,
        "port": seed.address.port,
        "rank": seed.address.rank,
        "fingerprint": seed.fingerprint,
        "epoch": seed.epoch,
        "labels": dict(seed.labels),
        "slots": seed.slots,
        "leases": seed.leases,
        "draining": seed.is_draining,
        "drained": seed.drained,
        "failures": len(seed.failed),
        "causes": seed.causes,
        "aside_s": max(0.0, round(seed.quarantined_until - now, 1)),
        "held_s": max(0.0, round(seed.recovering_until - now, 1)),
        "present": bool(seed.presence),
        "absent": seed.absent,
        "seen_s_ago": round(now - seed.seen_at, 1),
        "age_s": round(now - seed.first_seen, 1),
    }


def lease_entry(lease: Lease, now: float) -> dict[str, Any]:
    """Return one lease, for people."""
    return {
        "lease": lease_id(lease.user_id),
        "key": lease.key,
        "seed": lease.name,
        "receiver": lease.who,
        "held_s": round(now - lease.granted_at, 1),
        "expires_in_s": round(lease.expires_at - now, 1),
    }


def waiter_entry(place: int, waiter: Waiter, now: float) -> dict[str, Any]:
    """Return one waiting receiver and its place in its key's queue, for people."""
    return {
        "key": waiter.ask.key,
        "place": place,
        "receiver": waiter.ask.receiver,
        "fingerprint": waiter.ask.fingerprint,
        "intent": waiter.ask.intent,
        "waited_s": round(now - waiter.since, 1),
        "wait_s": round(waiter.bound_s, 1) or waiter.ask.wait_s,
    }
