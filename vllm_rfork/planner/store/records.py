"""The records of a fleet: seeds, leases, intents and waiting receivers. Data and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from vllm_rfork.messages import CacheResults, SeedAddress
from vllm_rfork.messages.metering import Served
from vllm_rfork.planner.store.base import Ask, Granted, Missed
from vllm_rfork.planner.store.journal import Record

_NOTHING = Served(0, 0)


class Place(NamedTuple):
    """The place of a worker, for people: the address of its connection, and its labels ``host`` and ``pod``."""

    address: str = ""
    host: str = ""
    pod: str = ""

    @classmethod
    def of(cls, ask: Ask) -> Place:
        """Return the place of a receiver."""
        return cls(ask.receiver, ask.labels.get("host", ""), ask.labels.get("pod", ""))


@dataclass(slots=True)
class Seed(Record):
    """One announced seed.

    Attributes:
        failed: receivers whose forks from it failed since the last success or quarantine, each with the cause.
        quarantines: how often it was quarantined since the last fork that succeeded.
        draining: it was withdrawn, and is dropped when its last lease ends.
        drained: an operator drains it.
        causes: the failures that led to the last quarantine.
        quarantined_until: no grants before this time, because forks of several receivers failed.
        recovering_until: no grants before this time, because leases of an earlier state may still be in use.
        earlier_state: the state id that the seed last received, if it is not the present one.
        attends: the seed keeps a presence connection; without one it is absent.
        presence: number of the presence request that is held for the seed; 0 if there is none.
        absent: the connection broke, at ``absent_at``: the seed's process is presumed dead.
        given_up: waiting receivers no longer count on the seed's return.
        caches: the first report on the caches of its own start.
        parent: the seed that it was forked from; it may be gone. Empty: its weights came from storage, or unknown.
        differs: the facts in which it differs from seeds of its key with other fingerprints, by its own report.
        served: the forks from it that succeeded, as receivers reported them.
        standing: serving, draining, quarantined, absent, as the indexes have it; None: in no index.
        counted: the grantable and the withheld slots, as the indexes have them.
    """

    #: What every heartbeat and lease changes. A successor restarts the deadlines and counts the leases itself.
    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"seen_at", "stale_at", "turn", "leases", "standing", "counted", "presence", "absent", "absent_at", "given_up"}
    )

    key: str
    address: SeedAddress
    name: str
    fingerprint: str
    slots: int
    labels: Mapping[str, str]
    epoch: str
    first_seen: float
    seen_at: float
    turn: int
    nic: str
    buckets: tuple[str, ...]
    leases: int = 0
    draining: bool = False
    drained: bool = False
    failed: tuple[tuple[str, str], ...] = ()
    quarantines: int = 0
    causes: str = ""
    quarantined_until: float = 0.0
    recovering_until: float = 0.0
    stale_at: float = 0.0
    earlier_state: str = ""
    attends: bool = False
    presence: int = 0
    absent: bool = False
    absent_at: float = 0.0
    given_up: bool = False
    caches: CacheResults | None = None
    parent: str = ""
    differs: str = ""
    served: Served = _NOTHING
    standing: tuple[bool, bool, bool, bool] | None = None
    counted: tuple[int, int] = (0, 0)

    @property
    def is_draining(self) -> bool:
        """The seed gets no new lease, because it was withdrawn or an operator drains it."""
        return self.draining or self.drained

    def is_serving(self, now: float) -> bool:
        """Return whether the seed will grant sooner or later, so that waiting for it makes sense."""
        return not self.is_draining and not self.given_up and now >= self.quarantined_until

    def is_open(self, now: float) -> bool:
        """Return whether the seed can take one more lease now."""
        grants = self.recovering_until <= now < self.stale_at and not self.absent
        return grants and self.is_serving(now) and self.leases < self.slots


@dataclass(slots=True)
class Drain(Record):
    """An operator's order to grant the seed of this key and epoch to nobody; its name is the seed's."""

    key: str
    epoch: str


@dataclass(slots=True)
class Lease(Record):
    """One lease.

    Attributes:
        name: of its seed.
        key: empty while the seed is unknown.
        receiver: the address that the receiver's connection came from.
        unfetched_ticket: the ticket of the waiting receiver that has not fetched the lease yet.
        fingerprint, epoch: of the seed at the time of the grant; compared if the seed goes stale and returns.
        host, pod: the receiver's labels. Behind a proxy all receivers have one address.
        ticket: the receiver's own, if it has one.
        worker: the receiver's id as a pending loader, under which it announces itself later; may be empty.
        confirmed: the receiver has renewed the lease, or has no ticket. Until then the lease is short.
    """

    #: A successor gives every lease its full TTL, so renewals need not be stored.
    VOLATILE: ClassVar[frozenset[str]] = frozenset({"expires_at", "confirmed"})

    user_id: str
    name: str
    key: str
    receiver: str
    granted_at: float
    expires_at: float
    unfetched_ticket: str = ""
    fingerprint: str = ""
    epoch: str = ""
    host: str = ""
    ticket: str = ""
    confirmed: bool = True
    worker: str = ""
    pod: str = ""

    @property
    def who(self) -> str:
        """The receiver as logs show it and as failures are counted."""
        return f"{self.receiver} (host={self.host})" if self.host else self.receiver


@dataclass(slots=True)
class Intent(Record):
    """A pending loader: a worker that loads ``key`` from storage and will be a seed.

    Attributes:
        since: when it began.
        address, host, pod: its :class:`Place`, as far as it is known.
    """

    key: str
    intent: str
    fingerprint: str
    ttl_s: float
    since: float = 0.0
    address: str = ""
    host: str = ""
    pod: str = ""


@dataclass(slots=True)
class Waiter:
    """One receiver in a queue.

    Attributes:
        number: grows with every waiter; its order in the queue.
        result: set once the receiver is settled.
        attached: a request of the receiver is open. Without one it is not served.
        bound_s: its longest total wait, as last computed.
    """

    ticket: str
    ask: Ask
    number: int
    since: float
    result: Granted | Missed | None = None
    attached: bool = True
    bound_s: float = 0.0
