"""The store's state as plain JSON data for people: snapshot and history. Nothing here decides anything.

Lease ids are shown by their first characters only: whoever knows one whole may release the lease.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm_rfork.planner.records import Book, Journal
from vllm_rfork.planner.store import Outcome

if TYPE_CHECKING:
    from vllm_rfork.planner.estimates import KeyTimes
    from vllm_rfork.planner.fleet import Lease, Seed, Waiter
    from vllm_rfork.planner.ledger import Ledger

_SHOWN = 4


@dataclass(frozen=True)
class PastFork:
    """One lease that is over. ``result`` is ``ok``, ``failed``, ``released`` (no word) or ``expired``.

    ``duration_s`` is the fork's own time as its receiver reported it. Where it reported none it is the lease's, which
    may be much longer, and ``of_lease`` is set.
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

    @classmethod
    def of(cls, lease: Lease, now: float, result: str, outcome: Outcome | None) -> PastFork:
        """The lease that ends ``now``, with what its receiver said."""
        said = outcome or Outcome(ok=False)
        return cls(
            key=lease.key,
            seed=lease.name,
            receiver=lease.who,
            result=result,
            cause=said.cause,
            nbytes=said.nbytes,
            duration_s=said.duration_s or round(now - lease.granted_at, 3),
            at=now,
            of_lease=not said.duration_s,
            side=said.side,
            lane=said.lane,
        )


class History(deque[PastFork]):
    """The last ``maxlen`` past forks, the youngest last; ``append`` alone changes it."""

    def __init__(self, maxlen: int, journal: Journal | None = None) -> None:
        super().__init__(maxlen=maxlen)
        #: the same forks under running numbers
        self._book = Book("past", PastFork, journal, in_order=True)
        self._number = 0

    def append(self, past: PastFork) -> None:
        """Add ``past``, and forget the oldest if there are too many."""
        self.put_back(self._number, past)

    def put_back(self, number: int, past: PastFork) -> None:
        """Add ``past`` under the number that an earlier leader gave it; numbers must grow."""
        super().append(past)
        self._book[str(number)] = past
        self._number = number + 1
        while len(self._book) > len(self):
            del self._book[next(iter(self._book))]


def past_fork(entry: Mapping[str, Any], now: float) -> dict[str, Any]:
    """``entry`` (the fields of :class:`PastFork`) with its age and rate instead of its time."""
    rate = entry["nbytes"] / entry["duration_s"] / 1e9 if entry["nbytes"] and entry["duration_s"] else None
    shown = {name: value for name, value in entry.items() if name != "at"}
    return shown | {"ago_s": round(now - entry["at"], 1), "gb_per_s": rate and round(rate, 3)}


def lease_id(user_id: str) -> str:
    """Enough of a lease id to tell two apart, too little to release one."""
    return user_id.rpartition(".")[2][:_SHOWN] + "…"


def snapshot(books: Ledger, history: Sequence[PastFork], *, key: str | None, limit: int) -> dict[str, Any]:
    """See :meth:`vllm_rfork.planner.store.Store.snapshot`."""
    now, leases = books.now, books.leases
    chosen = [shelf for shelf in books.shelves.values() if key is None or shelf.key == key]
    seeds = itertools.islice((seed for shelf in chosen for seed in shelf.seeds.values()), limit)
    held: Iterable[Lease] = leases.values()
    if key is not None:
        held = (leases[each] for shelf in chosen for name in shelf.seeds for each in books.leases_of.get(name, ()))
    waiting = (pair for shelf in chosen for pair in enumerate(shelf.line(), start=1))
    intents = ((shelf.key, each, print_) for shelf in chosen for each, print_ in shelf.intents.items())
    times = ((name, each) for name, each in books.times.items() if key is None or name == key)
    past = (each for each in reversed(history) if key is None or each.key == key)
    return {
        "state": books.state_id,
        "age_s": round(now - books.born_at, 1),
        "policy": books.rules.policy.name,
        "keys": {shelf.key: asdict(shelf.totals(now)) for shelf in chosen[:limit]},
        "seeds": [seed_entry(each, now) for each in seeds],
        "leases": [lease_entry(each, now) for each in itertools.islice(held, limit)],
        "waiting": [waiter_entry(place, each, now) for place, each in itertools.islice(waiting, limit)],
        "intents": [
            {"key": name, "intent": intent, "fingerprint": print_}
            for name, intent, print_ in itertools.islice(intents, limit)
        ],
        "times": [{"key": name, **times_entry(each)} for name, each in itertools.islice(times, limit)],
        "history": [past_fork(asdict(each), now) for each in itertools.islice(past, limit)],
    }


def times_entry(times: KeyTimes) -> dict[str, Any]:
    """The measured times of one key, for people."""
    return {name: round(value, 3) for name, value in asdict(times).items()}


def seed_entry(seed: Seed, now: float) -> dict[str, Any]:
    """One seed, for people."""
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
        "draining": seed.draining,
        "failures": len(seed.failed),
        "causes": seed.causes,
        "aside_s": max(0.0, round(seed.aside_until - now, 1)),
        "held_s": max(0.0, round(seed.held_until - now, 1)),
        "present": bool(seed.presence),
        "absent": seed.absent,
        "seen_s_ago": round(now - seed.seen_at, 1),
        "age_s": round(now - seed.first_seen, 1),
    }


def lease_entry(lease: Lease, now: float) -> dict[str, Any]:
    """One lease, for people."""
    return {
        "lease": lease_id(lease.user_id),
        "key": lease.key,
        "seed": lease.name,
        "receiver": lease.who,
        "held_s": round(now - lease.granted_at, 1),
        "expires_in_s": round(lease.expires_at - now, 1),
    }


def waiter_entry(place: int, waiter: Waiter, now: float) -> dict[str, Any]:
    """One waiting receiver and its place in its key's line, for people."""
    return {
        "key": waiter.ask.key,
        "place": place,
        "receiver": waiter.ask.receiver,
        "fingerprint": waiter.ask.fingerprint,
        "intent": waiter.ask.intent,
        "waited_s": round(now - waiter.since, 1),
        "wait_s": round(waiter.bound_s, 1) or waiter.ask.wait_s,
    }
