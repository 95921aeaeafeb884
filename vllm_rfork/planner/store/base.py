"""The planner's state as a port: the decisions of every store, in plain data.

Each method is one atomic decision. Of several planner processes over one store one leads and decides; the others raise
:class:`StoreUnavailable`. A store never sleeps and does no HTTP. It owns the order of the queue: the receiver that has
waited longest for a key gets the next suitable slot, before any newcomer.

A *ticket* names one waiting receiver. It is *settled* once the receiver has a lease or has to load from storage. A
store calls ``notify`` for settled tickets; :meth:`Store.settle` and :meth:`Store.park` fetch the result.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_rfork.messages import TICKET_INTENT_TTL_S, CacheResults, OtherSeeds, SeedAddress, Waiting
from vllm_rfork.messages.metering import Served
from vllm_rfork.planner.policy import Policy
from vllm_rfork.planner.store.key_use import UNNAMED, KeyNames
from vllm_rfork.planner.store.lease_ids import LeaseIds


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Parameters of decisions, in seconds; the same for all replicas of a fleet.

    Attributes:
        claim_s: how long a lease waits for its waiting receiver to fetch it.
        confirm_s: how long a lease by ticket waits for its first renewal, and a place in the queue for its receiver.
        default_wait_s: the longest wait of a receiver that states none, if no load of the key was measured; 0: none.
        max_wait_s: the longest wait that a receiver does not state itself.
        recovery_hold_s: how long no seed is granted after a start without state.
        presence_grace_s: how soon a seed must send its next presence request after the answer to one.
        presence_takeover_s: the same after another replica took over, since connections ended with the one before.
        return_s: for this long after its connection broke, receivers wait for a seed's return, and heartbeats do not
            end its absence: the process may have sent them before it died.
        failures: distinct receivers whose forks fail in a row before a seed is quarantined.
    """

    policy: Policy
    lease_ttl_s: float = 60.0
    stale_s: float = 60.0
    intent_ttl_s: float = 60.0
    claim_s: float = 5.0
    confirm_s: float = 10.0
    default_wait_s: float = 120.0
    max_wait_s: float = 600.0
    recovery_hold_s: float = 0.0
    presence_grace_s: float = 5.0
    presence_takeover_s: float = 20.0
    return_s: float = 2.0
    slots: int = 1
    max_slots: int = 64
    failures: int = 3
    backoff_s: float = 10.0
    max_backoff_s: float = 300.0
    max_keys: int = 10_000
    max_seeds: int = 200_000
    max_waiters: int = 20_000
    max_intents: int = 20_000
    max_history: int = 256

    def intent_ttl_of(self, ask: Ask) -> float:
        """Return for how long the intent of ``ask`` is recorded, in seconds."""
        return min(self.intent_ttl_s, TICKET_INTENT_TTL_S) if ask.keeps else self.intent_ttl_s

    @property
    def confirmation_s(self) -> float:
        """``confirm_s``, but no longer than a lease lives."""
        return min(self.confirm_s, self.lease_ttl_s)


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A seed announces itself with ``add_seed``. ``slots`` None: the fleet's default.

    Attributes:
        known_state: the state id that the planner last sent to this seed. If it is not the present one, the planner has
            lost its state, and the seed may have leases that are unknown now.
        caches: what the seed's own start took from the caches of another seed; None before its warm-up.
        parent, differs: the seed that it was forked from, and its differences to others; for people.
    """

    key: str
    seed: SeedAddress
    fingerprint: str = ""
    slots: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    epoch: str = ""
    intent: str = ""
    known_state: str = ""
    caches: CacheResults | None = None
    names: KeyNames = UNNAMED
    parent: str = ""
    differs: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A receiver asks for a seed with ``get_seed``, and waits for one for up to ``wait_s``.

    Attributes:
        receiver: its address, for people.
        ticket: unique; its name in the queue.
        intent: its id as a pending loader, if it loads from storage when there is nothing to wait for.
        keeps: the ticket is the receiver's own. It asks again with it, and gets the same answer again.
        patient: it states no wait, and waits as long as that is expected to be faster than a load from storage.
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
    names: KeyNames = UNNAMED


@dataclass(frozen=True)
class Outcome:
    """The report of a receiver that releases its lease.

    Attributes:
        duration_s: measured by the receiver; 0 if it reports none.
        cause: the class name of the error.
        side: one of ``messages.SIDES``, or empty.
        lane: engine and lane.
    """

    ok: bool
    nbytes: int = 0
    duration_s: float = 0.0
    cause: str = ""
    side: str = ""
    lane: str = ""


@dataclass(frozen=True)
class Granted:
    """A lease on ``seed`` for ``ttl_s`` from now.

    Attributes:
        waited_s: how long its receiver was in the queue; None if it was not.
        by_ticket: the receiver asks again if the answer does not arrive, and the lease ends soon if it does not.
        load_s: the measured time of a load of the key from storage; 0: unknown. For metrics.
    """

    seed: SeedAddress
    user_id: str
    ttl_s: float
    waited_s: float | None = field(default=None, compare=False)
    by_ticket: bool = field(default=False, compare=False)
    load_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Missed:
    """There is no seed: load from storage. All fields but ``intent`` are for people.

    Attributes:
        intent: the planner has recorded that this receiver loads.
        reason: one of ``messages.MISSES``, or empty.
        others: seeds of this key with other fingerprints.
        text: why the receiver does not wait, or no longer.
        waited_s: how long it was in the queue; None if it was not.
    """

    intent: bool = False
    reason: str = field(default="", compare=False)
    others: tuple[OtherSeeds, ...] = field(default=(), compare=False)
    text: str = field(default="", compare=False)
    waited_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Queued:
    """The receiver is in the queue of its key under ``ticket``, for ``left_s`` more seconds.

    Attributes:
        place: for one that keeps its ticket, what it is answered.
        parked: it is served only once it has asked again.
    """

    ticket: str
    place: Waiting | None = None
    left_s: float = 0.0
    parked: bool = False


@dataclass(frozen=True)
class Released:
    """A lease that ended after ``held_s`` seconds; its fork was shorter than a measured load by ``saved_s``."""

    key: str
    held_s: float
    saved_s: float = 0.0


@dataclass(frozen=True)
class Event:
    """Something that a store reports, for logs and metrics.

    ``kind`` is one of ``seed_added``, ``seed_dropped`` (``detail``: the reason), ``seed_absent``, ``seed_returned``,
    ``seed_aside`` (quarantined; ``detail``: seconds), ``quarantine_lifted``, ``seed_drained``, ``seed_undrained`` (the
    last three by an operator), ``lease_expired``, ``lease_dropped`` (with its seed),
    ``lease_adopted``, ``intent_expired``, ``state_lost``, ``fork_ok`` and ``fork_failed`` (reported by a receiver),
    ``caches_reported`` (``facts``: the fields of its :class:`CacheResults`). ``facts`` are more fields for the log.
    """

    kind: str
    key: str = ""
    seed: str = ""
    detail: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Totals:
    """Counts over one key or the whole fleet. ``aside`` are quarantined seeds, ``oldest_wait_s`` is an age."""

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
        # A loop over the fields takes ten times as long, and there may be thousands of keys.
        self.seeds += other.seeds
        self.draining += other.draining
        self.aside += other.aside
        self.absent += other.absent
        self.slots += other.slots
        self.leases += other.leases
        self.waiting += other.waiting
        self.intents += other.intents
        self.oldest_wait_s = max(self.oldest_wait_s, other.oldest_wait_s)


class Store(abc.ABC):
    """The port. All methods raise :class:`StoreUnavailable` if the state cannot be reached.

    The owner replaces these callbacks before :meth:`open`, and ``lease_ids`` if callers need a token. They must not
    block.

    Attributes:
        notify: called with a ticket that may be settled now.
        notify_all: called when any ticket may be settled.
        lost: called when the numbers of :meth:`attend` have become invalid, because another process may decide now.
        observe: called with every :class:`Event`.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.notify: Callable[[str], None] = lambda _: None
        self.notify_all: Callable[[], None] = lambda: None
        self.lost: Callable[[], None] = lambda: None
        self.observe: Callable[[Event], None] = lambda _: None
        self.lease_ids = LeaseIds()

    @abc.abstractmethod
    async def open(self) -> None:
        """Connect; then every other method works. After :class:`StoreUnavailable`, call it again later."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Release everything; idempotent. State that others share stays."""

    @abc.abstractmethod
    async def ping(self) -> None:
        """Return if decisions can be made here."""

    @abc.abstractmethod
    async def announce(self, announcement: Announcement) -> tuple[str, Served]:
        """Add or refresh a seed; returns the state id, and what the seed has served. Raises :class:`LimitReached`."""

    @abc.abstractmethod
    async def withdraw(self, key: str, seed: SeedAddress) -> None:
        """Remove a seed. Raises :class:`UnknownSeed` or :class:`StillLeased`."""

    @abc.abstractmethod
    async def drain(self, key: str, seed: SeedAddress, *, undo: bool) -> int:
        """Grant a seed to nobody until this is undone, or until its next epoch; returns its leases, which stay.

        It holds also if the seed is dropped as stale and returns with the same epoch. Raises :class:`UnknownSeed`, or
        :class:`LimitReached` if too many seeds are drained.
        """

    @abc.abstractmethod
    async def lift(self, key: str, seed: SeedAddress) -> bool:
        """End the quarantine of a seed; returns whether it was quarantined. Raises :class:`UnknownSeed`."""

    @abc.abstractmethod
    async def find(self, key: str) -> SeedAddress | None:
        """Return one serving seed of ``key``, another one each time; None if there is none."""

    @abc.abstractmethod
    async def attend(self, announcement: Announcement, *, held: bool) -> int:
        """Handle a presence request of a known seed, which is not absent from now on. Returns the connection's number.

        ``held``: the request is held from now on, in place of any earlier one, and :meth:`leave` follows. Without it
        the seed lives by its heartbeats.

        Raises:
            UnknownSeed: no such seed with this key, fingerprint and epoch; it has to be announced first.
        """

    @abc.abstractmethod
    async def leave(self, seed: SeedAddress, number: int, *, answered: bool) -> None:
        """End the held presence request ``number``, which was answered, or whose connection broke.

        Unless ``answered``, the seed is absent from now on and is not granted. If a later request of the seed is held,
        nothing changes.
        """

    @abc.abstractmethod
    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """Give ``ask`` a seed, a place in the queue, or neither."""

    @abc.abstractmethod
    async def settle(self, ticket: str, *, leave: bool, loads: bool = True) -> Granted | Missed | Queued | None:
        """Fetch a ticket's result, which starts the lease's full TTL and forgets the ticket.

        ``leave`` takes a receiver that still waits out of the queue: :class:`Missed`. Otherwise it stays:
        :class:`Queued`. None: the ticket is unknown, or its lease was not fetched in time. ``loads`` False: the
        receiver does not learn that it should load (it hung up, or is sent to another planner), so no intent is
        recorded.
        """

    @abc.abstractmethod
    async def park(self, ticket: str, *, hung_up: bool = False) -> Granted | Missed | Queued | None:
        """Fetch the result of a receiver that keeps its ticket, as :meth:`settle` does, or leave it in the queue:
        Queued.

        It is not served until it asks again, and is forgotten if it does not within ``confirm_s``. ``hung_up``: the
        answer does not arrive, so an intent is withdrawn again, and a lease is left for the receiver to fetch.
        """

    @abc.abstractmethod
    async def renew(self, seed: SeedAddress, user_id: str) -> None:
        """Give a lease its full TTL again. Raises :class:`UnknownLease`.

        Within one TTL after a start without state, a lease of an earlier state is taken over if it can be verified: its
        id proves itself, or the seed reports that state and has a slot for it. Until the seed does, the lease is noted.
        """

    @abc.abstractmethod
    async def release(self, seed: SeedAddress, user_id: str, outcome: Outcome | None) -> Released:
        """End a lease. Raises :class:`UnknownLease`."""

    @abc.abstractmethod
    async def intend(
        self, key: str, intent: str, fingerprint: str, ttl_s: float, *, names: KeyNames = UNNAMED, address: str = ""
    ) -> None:
        """Record for ``ttl_s`` that a worker loads ``key`` from storage; 0 forgets it. Raises LimitReached."""

    @abc.abstractmethod
    async def sweep(self) -> float:
        """Do everything that is due; returns the seconds until the next thing is, or infinity."""

    @abc.abstractmethod
    async def totals(self) -> dict[str, Totals]:
        """Count by key. Linear in the number of keys."""

    @abc.abstractmethod
    def names_of(self, key: str) -> KeyNames:
        """Return model and strategy of ``key``; both are empty if they are unknown, or this process does not decide."""

    @abc.abstractmethod
    def snapshot_slices(
        self, *, key: str | None = None, limit: int = 1000
    ) -> AsyncIterator[tuple[str, str | float | list[Any] | dict[str, Any]]]:
        """Yield the fields of a snapshot in order; lists and ``keys`` first empty, then some entries at a time.

        The fields are plain JSON data: ``keys``, and the lists seeds, leases, waiting, intents, times and history, each
        of at most ``limit`` entries, of one ``key`` if given. Ages are in seconds. Lease ids are shortened.

        Other calls have their turn between two slices, so this is not one decision: the records are those of the
        beginning, and each is shown as it is when its slice is made.
        """

    @abc.abstractmethod
    async def overview(
        self, *, key: str | None = None, names: KeyNames | None = None, find: str = "", limit: int = 100
    ) -> dict[str, Any]:
        """Return the data of the dashboard, in the form that ``planner/store/overview.py`` describes.

        Of one ``key``, all keys with ``names``, or what contains ``find``. Other calls have their turn meanwhile.
        """
