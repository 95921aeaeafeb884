"""The planner's state as a port: what every store can do, in plain data.

Every method is one atomic decision. Of several planner processes over one store one leads and decides; the others
raise :class:`StoreUnavailable`. A store never sleeps and never answers HTTP. The order of the waiting line is the
store's: whoever waits longest for a key and may use a seed is given it the moment a slot is free, before any newcomer.

Vocabulary beyond ``words.md``: a *ticket* names one waiting receiver; it is *settled* once it has a lease or is
told to load from storage. ``Store.notify`` hears of settled tickets, and ``Store.settle`` fetches the result.

Must not import aiohttp or redis.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_rfork.errors import RForkError
from vllm_rfork.messages import TICKET_INTENT_TTL_S, OtherSeeds, SeedAddress, Waiting
from vllm_rfork.planner.policy import Policy
from vllm_rfork.planner.store.lease_ids import LeaseIds

#: Failures that say nothing about the seed.
SEED_NOT_TO_BLAME = frozenset({"ConfigError", "ManifestMismatch", "NoSeedAvailable", "PlannerError"})

#: A waiting receiver whose replica never came back for it is forgotten so long after its wait was over, in seconds.
WAIT_GRACE_S = 10.0


class StoreError(RForkError):
    """Base of what a store answers instead of doing what was asked."""


class UnknownLease(StoreError):
    """No such lease: released, expired, dropped with its seed, or never granted. HTTP 404."""


class UnknownSeed(StoreError):
    """No such seed under that key. HTTP 404."""


class StillLeased(StoreError):
    """The seed still has leases; it is draining now and gets no new one. HTTP 409."""


class LimitReached(StoreError):
    """A bound on keys, seeds or intents is reached; the text says which. HTTP 429."""


class StoreUnavailable(StoreError):
    """The store cannot decide here and now: Redis is unreachable, or another replica leads. HTTP 503."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a store decides by. Seconds throughout; the same for all replicas of one fleet."""

    policy: Policy
    lease_ttl_s: float = 60.0
    stale_s: float = 60.0
    intent_ttl_s: float = 60.0
    #: how long a lease waits for its waiting receiver to fetch it
    claim_s: float = 5.0
    #: how long a lease by ticket waits for its first renewal, and a place in the queue for its receiver
    confirm_s: float = 10.0
    #: the wait of a receiver that states none, for a key of which no load was measured; 0: it does not wait
    default_wait_s: float = 120.0
    #: the longest wait that is not stated
    max_wait_s: float = 600.0
    #: after a start without state: how long no seed at all is granted
    recovery_hold_s: float = 0.0
    #: a seed whose presence request was answered sends the next within this, or is absent
    presence_grace_s: float = 5.0
    #: the same after a replica took over: connections ended with the one before
    presence_takeover_s: float = 20.0
    #: for so long after its connection broke, waiting receivers stay in line for a seed, and heartbeats do not bring it
    #: back: the process may have sent them before it died
    return_s: float = 2.0
    slots: int = 1
    max_slots: int = 64
    #: distinct receivers whose forks fail in a row, after which a seed is quarantined
    failures: int = 3
    backoff_s: float = 10.0
    max_backoff_s: float = 300.0
    max_keys: int = 10_000
    max_seeds: int = 200_000
    max_waiters: int = 20_000
    max_intents: int = 20_000
    max_history: int = 256

    def intent_ttl_of(self, ask: Ask) -> float:
        """How long the intent of ``ask`` is remembered unless it is renewed, in seconds."""
        return min(self.intent_ttl_s, TICKET_INTENT_TTL_S) if ask.keeps else self.intent_ttl_s

    @property
    def confirmation_s(self) -> float:
        """How long a lease by ticket waits for its first renewal, and a place in the queue for its receiver."""
        return min(self.confirm_s, self.lease_ttl_s)


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """``add_seed``: this seed is alive. ``slots`` None: the fleet's default.

    ``known_state`` is the state id that the planner last answered this seed with. Where it is not the present
    one, the planner has lost its state and the seed may carry leases that nobody remembers.
    """

    key: str
    seed: SeedAddress
    fingerprint: str = ""
    slots: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    epoch: str = ""
    intent: str = ""
    known_state: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """``get_seed``: one receiver wants a seed, now or within ``wait_s``, in line under ``ticket`` (unique).

    ``intent`` is the receiver's id where it says that it loads from storage if there is nothing to wait for.
    ``receiver`` is for people to read. ``keeps``: the ticket is the receiver's own, and it comes back with it: what it
    was given it is given again. ``patient``: it states no wait, and waits for as long as that is expected to be faster
    than reading storage.
    """

    key: str
    receiver: str
    fingerprint: str = ""
    wait_s: float = 0.0
    ticket: str = ""
    exclude: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    intent: str = ""
    keeps: bool = False
    patient: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a receiver says of its fork when it releases its lease.

    ``duration_s`` is the receiver's own time, 0 where it states none; ``cause`` the error's class name; ``side`` one of
    ``messages.SIDES`` or empty; ``lane`` the engine and lane.
    """

    ok: bool
    nbytes: int = 0
    duration_s: float = 0.0
    cause: str = ""
    side: str = ""
    lane: str = ""


@dataclass(frozen=True)
class Granted:
    """A lease on ``seed`` until ``ttl_s`` from now.

    ``waited_s``: how long its receiver stood in the queue, if so. ``by_ticket``: the receiver asks again if it does not
    get the answer, and the lease ends soon if it does not.
    """

    seed: SeedAddress
    user_id: str
    ttl_s: float
    waited_s: float | None = field(default=None, compare=False)
    by_ticket: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Missed:
    """Nothing to give: load from storage. ``intent``: the planner remembers that this receiver does.

    For people, and no part of the decision: ``reason``, one of ``messages.MISSES`` or empty where the store gives none,
    ``others``, the seeds of this key with other fingerprints, ``text``, why it does not wait, or no longer, and
    ``waited_s``, how long it stood in the queue, if it did.
    """

    intent: bool = False
    reason: str = field(default="", compare=False)
    others: tuple[OtherSeeds, ...] = field(default=(), compare=False)
    text: str = field(default="", compare=False)
    waited_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Queued:
    """The receiver stands in its key's line under ``ticket``.

    For one that ``keeps`` its ticket: its place, the seconds until its wait is over, and what it is to be told.
    ``parked``: it is served only once it has asked again.
    """

    ticket: str
    place: Waiting | None = None
    left_s: float = 0.0
    parked: bool = False


@dataclass(frozen=True)
class Released:
    """A lease that is gone now; ``held_s`` is how long it lived."""

    key: str
    held_s: float


@dataclass(frozen=True)
class Event:
    """Something a store did by itself, for logs and metrics.

    ``kind`` is one of ``seed_added``, ``seed_dropped`` (``detail``: why), ``seed_absent``, ``seed_returned``,
    ``seed_aside`` (quarantined; ``detail``: seconds), ``lease_expired``, ``lease_dropped`` (its seed went),
    ``lease_adopted``, ``intent_expired``, ``state_lost``, ``fork_ok`` and ``fork_failed`` (what a receiver reported).
    ``facts`` are more fields for the log.
    """

    kind: str
    key: str = ""
    seed: str = ""
    detail: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Totals:
    """Counts over one key or the whole fleet. ``oldest_wait_s`` is the age of the line's oldest waiter."""

    seeds: int = 0
    draining: int = 0
    aside: int = 0
    absent: int = 0
    slots: int = 0
    leases: int = 0
    waiting: int = 0
    intents: int = 0
    oldest_wait_s: float = 0.0

    def add(self, other: Totals) -> None:
        """Add ``other`` in place; the age is the larger of the two."""
        # Spelt out: there may be thousands of keys, and a loop over the fields takes ten times as long.
        self.seeds += other.seeds
        self.draining += other.draining
        self.aside += other.aside
        self.absent += other.absent
        self.slots += other.slots
        self.leases += other.leases
        self.waiting += other.waiting
        self.intents += other.intents
        self.oldest_wait_s = max(self.oldest_wait_s, other.oldest_wait_s)


def _ignore(_: Any) -> None:
    """Nobody listens yet."""


class Store(abc.ABC):
    """The port. All methods raise :class:`StoreUnavailable` where the state cannot be reached.

    ``notify`` is called with a ticket that may be settled now, ``notify_all`` where any ticket may be, ``lost`` when
    the numbers of :meth:`attend` mean nothing any more, because another process may decide now, and ``observe`` with
    every :class:`Event`; their owner replaces them before :meth:`open`, and ``lease_ids`` if callers need a token. They
    must not block.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.notify: Callable[[str], None] = _ignore
        self.notify_all: Callable[[], None] = lambda: None
        self.lost: Callable[[], None] = lambda: None
        self.observe: Callable[[Event], None] = _ignore
        self.lease_ids = LeaseIds()

    @abc.abstractmethod
    async def open(self) -> None:
        """Connect; afterwards every other method works."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of everything; idempotent. Fleet state that others share stays."""

    @abc.abstractmethod
    async def announce(self, announcement: Announcement) -> str:
        """Add or refresh a seed; returns the state id. Raises :class:`LimitReached`."""

    @abc.abstractmethod
    async def attend(self, announcement: Announcement, *, held: bool) -> int:
        """A presence request of a known seed: it is back if it was absent. Returns the number of the connection.

        ``held``: the request is held from now on, in place of any earlier one, and :meth:`leave` follows. Else the
        seed lives by its heartbeats.

        Raises:
            UnknownSeed: no such seed under this key, fingerprint and epoch; it has to be announced first.
        """

    @abc.abstractmethod
    async def leave(self, seed: SeedAddress, number: int, *, answered: bool) -> None:
        """The held presence request ``number`` is over: ``answered``, or its connection broke.

        Unless ``answered``, the seed is absent from now on: it is not granted. Nothing happens where a later request
        of the seed is held.
        """

    @abc.abstractmethod
    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """Give ``ask`` a seed, a place in the line, or neither."""

    @abc.abstractmethod
    async def settle(self, ticket: str, *, leave: bool, loads: bool = True) -> Granted | Missed | Queued | None:
        """Fetch a ticket's result, which starts the lease's full TTL and forgets the ticket.

        ``leave`` takes a receiver that still waits out of the line: :class:`Missed`. Otherwise it stays:
        :class:`Queued`. None: the ticket is unknown, or its lease was not fetched in time. ``loads`` False: nobody
        will hear that it is to load (it hung up, or is sent to another planner), so its intent is not remembered.
        """

    @abc.abstractmethod
    async def park(self, ticket: str, *, hung_up: bool = False) -> Granted | Missed | Queued | None:
        """The result of a receiver that keeps its ticket, as :meth:`settle`, or leave it in the line: Queued.

        It is not served until it asks again, and is forgotten where it does not within ``confirm_s``. ``hung_up``:
        nobody hears the result, so what it was told is taken back, and what it was given is left for it to fetch.
        """

    @abc.abstractmethod
    async def release(self, seed: SeedAddress, user_id: str, outcome: Outcome | None) -> Released:
        """End a lease. Raises :class:`UnknownLease`."""

    @abc.abstractmethod
    async def renew(self, seed: SeedAddress, user_id: str) -> None:
        """Give a lease its full TTL again. Raises :class:`UnknownLease`.

        Within one TTL after a start without state, a lease of an earlier state is taken over if it can be checked: its
        id proves itself, or the seed reports that state and has a slot for it. Until the seed does, the lease is noted.
        """

    @abc.abstractmethod
    async def withdraw(self, key: str, seed: SeedAddress) -> None:
        """Remove a seed. Raises :class:`UnknownSeed` or :class:`StillLeased`."""

    @abc.abstractmethod
    async def intend(self, key: str, intent: str, fingerprint: str, ttl_s: float) -> None:
        """Remember for ``ttl_s`` that somebody loads ``key`` from storage; 0 forgets. Raises LimitReached."""

    @abc.abstractmethod
    async def sweep(self) -> float:
        """Do everything that time has made due; returns seconds until the next thing is, or infinity."""

    @abc.abstractmethod
    async def totals(self) -> dict[str, Totals]:
        """Counts by key. Linear in the number of keys."""

    @abc.abstractmethod
    def snapshot_slices(
        self, *, key: str | None = None, limit: int = 1000
    ) -> AsyncIterator[tuple[str, str | float | list[Any] | dict[str, Any]]]:
        """The fields of :meth:`snapshot` in order; lists and ``keys`` first empty, and then some entries at a time.

        Other calls have their turn between two slices, so this is not one decision: the records are those of the
        beginning, and each is shown as it is when its slice is made.
        """

    async def snapshot(self, *, key: str | None = None, limit: int = 1000) -> dict[str, Any]:
        """Plain JSON data for people: ``keys`` and lists (seeds, leases, waiting, intents, times, history).

        Each list holds at most ``limit`` entries, of one ``key`` where given; ages in seconds. Lease ids are
        cut short: whoever knows one whole may release the lease.
        """
        whole: dict[str, Any] = {}
        async for name, value in self.snapshot_slices(key=key, limit=limit):
            if name not in whole:
                whole[name] = value
            elif isinstance(value, dict):
                whole[name].update(value)
            else:
                whole[name] += value
        return whole

    @abc.abstractmethod
    async def overview(self, *, key: str | None = None, limit: int = 100) -> dict[str, Any]:
        """What a person should see first, as plain JSON data; ``planner/store/overview.py`` has its form.

        Its cost grows with the number of keys and with ``limit``, never with the number of seeds, leases or waiters.
        Keys are counted some at a time, with other calls in between: this is not one decision. Lease ids are cut short.
        """

    @abc.abstractmethod
    async def ping(self) -> None:
        """Return where decisions can be made now."""
