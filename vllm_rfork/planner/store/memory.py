"""The in-memory store: one process, no dependencies, every decision between two awaits and therefore atomic.

Time comes from the ``clock`` it is given. Due things are done first in every call, so that a lease that has
expired never outlives the next decision; ``sweep`` does them where no call comes. The Redis store decides with
this one as well, and writes what changes: no rule exists a second time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllm_rfork import messages
from vllm_rfork.logs.quoting import counted
from vllm_rfork.messages import SeedAddress, Waiting
from vllm_rfork.planner.store import misses, overview, snapshot
from vllm_rfork.planner.store.base import (
    SEED_NOT_TO_BLAME,
    WAIT_GRACE_S,
    Announcement,
    Ask,
    Event,
    Granted,
    LimitReached,
    Missed,
    Outcome,
    Queued,
    Released,
    Rules,
    StillLeased,
    Store,
    Totals,
    UnknownLease,
    UnknownSeed,
)
from vllm_rfork.planner.store.estimates import KeyTimes, Verdict
from vllm_rfork.planner.store.fleet import Intent, Lease, Seed, Waiter
from vllm_rfork.planner.store.lease_ids import state_of
from vllm_rfork.planner.store.ledger import Ledger
from vllm_rfork.planner.store.prospects import prospects
from vllm_rfork.planner.store.records import Journal

#: Entries of a snapshot that are made at once, before others have their turn.
SLICE = 500


class MemoryStore(Store):
    """The fleet's state in this process.

    ``clock`` counts seconds and never goes backwards. ``journal`` notes what changes, for a store that writes it.
    """

    def __init__(
        self, rules: Rules, clock: Callable[[], float] = time.monotonic, journal: Journal | None = None
    ) -> None:
        super().__init__(rules)
        self._clock = clock
        self._ledger = Ledger(rules, clock(), journal)
        self._history = snapshot.History(rules.max_history, journal)
        #: leases of an earlier state that were renewed before their seed reported that state, by seed
        self._noted: dict[str, list[str]] = {}
        self._decision = _Decision(self)

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to let go of."""

    async def ping(self) -> None:
        """Memory is always there."""

    # --- seeds ---------------------------------------------------------------------------------------------------
    async def announce(self, announcement: Announcement) -> str:
        """See the port."""
        with self._decision as books:
            name = str(announcement.seed)
            seed = books.seeds.get(name)
            if seed is not None and (reason := _new_life(seed, announcement)):
                self._drop_seed(seed, reason)
                seed = None
            if seed is None:
                self._drop_leases_of_earlier_bytes(announcement)
                seed = books.add_seed(announcement, name)
                self._hold(seed, announcement.known_state)
                self._take_noted(seed)
                self.observe(Event("seed_added", seed.key, name))
            else:
                books.update_seed(seed, announcement)
            self._seen(seed)
            # A heartbeat soon after the connection broke may be one that the process had sent before it died.
            if seed.absent and books.now >= seed.absent_at + self.rules.return_s:
                self._back(seed)
            self._fulfil(seed.key, announcement.intent)
            self._serve(seed)
            return books.state_id

    def _fulfil(self, key: str, intent: str) -> None:
        """A pending loader has become a seed: its intent ends, and how long it took is known."""
        books = self._ledger
        shelf = books.shelves[key]
        if intent in shelf.since:
            books.times_of(key).add_load(books.now - shelf.since[intent])
        books.drop_intent(key, intent)

    def _drop_leases_of_earlier_bytes(self, announcement: Announcement) -> None:
        """A seed that was stale comes back to its leases, but not if it has become another one meanwhile."""
        books, name = self._ledger, str(announcement.seed)
        for user_id in list(books.leases_of.get(name, ())):
            lease = books.leases[user_id]
            if lease.key and _new_life(lease, announcement):
                self._drop_lease(lease)
                self.observe(Event("lease_dropped", lease.key, name))

    def _seen(self, seed: Seed) -> None:
        books = self._ledger
        seed.seen_at, seed.stale_at = books.now, books.now + self.rules.stale_s
        books.due.set(("seed", seed.name, ""), seed.stale_at)

    # --- presence ------------------------------------------------------------------------------------------------
    async def attend(self, announcement: Announcement, *, held: bool) -> int:
        """See the port."""
        with self._decision as books:
            seed = books.seeds.get(str(announcement.seed))
            if seed is None or _new_life(seed, announcement):
                raise UnknownSeed(
                    f"no seed {announcement.seed} with this key, fingerprint and epoch: announce it first"
                )
            number = books.next_number()
            seed.presence, seed.attends = (number if held else 0), held
            self._seen(seed)
            self._back(seed)
            self._serve(seed)
            return number

    async def leave(self, seed: SeedAddress, number: int, *, answered: bool) -> None:
        """See the port."""
        with self._decision as books:
            known = books.seeds.get(str(seed))
            if known is None or known.presence != number:
                return
            known.presence = 0
            if answered:
                books.due.set(("presence", known.name, ""), books.now + self.rules.presence_grace_s)
            else:
                self._lose(known, "its connection broke")

    def _lose(self, seed: Seed, why: str) -> None:
        """The seed's process is gone, as far as anybody can tell."""
        books = self._ledger
        seed.absent, seed.absent_at = True, books.now
        books.due.set(("presence", seed.name, ""), books.now + self.rules.return_s)
        books.rank(seed)
        if not seed.draining:  # else it has withdrawn, and goes when its last lease ends
            self.observe(Event("seed_absent", seed.key, seed.name, why))

    def _back(self, seed: Seed) -> None:
        """The seed is not absent, and nothing is awaited of it."""
        self._ledger.due.cancel(("presence", seed.name, ""))
        if seed.absent:
            seed.absent = seed.given_up = False
            self.observe(Event("seed_returned", seed.key, seed.name))

    def _overdue(self, seed: Seed) -> None:
        """The seed did not come back in time, or did not ask again."""
        if not seed.absent:
            self._lose(seed, "it did not send its next presence request")
            return
        seed.given_up = True
        self._ledger.bereft.add(seed.key)
        self._ledger.rank(seed)

    def _hold(self, seed: Seed, known_state: str) -> None:
        books, hold_s = self._ledger, self.rules.recovery_hold_s
        if known_state and known_state != books.state_id:
            # It served under a state that is gone: until every lease of that state has run out or has been
            # renewed here, nobody knows how many of its slots are taken.
            hold_s = max(hold_s, self.rules.lease_ttl_s)
            seed.earlier_state = known_state
            self.observe(Event("state_lost", seed.key, seed.name))
        if books.born_at + hold_s > books.now:
            seed.held_until = books.born_at + hold_s
            books.due.set(("blocked", seed.name, ""), seed.held_until)

    async def withdraw(self, key: str, seed: SeedAddress) -> None:
        """See the port."""
        with self._decision as books:
            known = books.seeds.get(str(seed))
            if known is None or known.key != key:
                raise UnknownSeed(f"no seed {seed} under this key")
            if not known.leases:
                self._drop_seed(known, "withdrawn")
                return
            known.draining = True
            books.bereft.add(key)
            books.rank(known)
            raise StillLeased(f"still held: {counted(known.leases, 'lease')}; the seed is draining")

    # --- leases --------------------------------------------------------------------------------------------------
    async def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """See the port."""
        with self._decision as books:
            if ask.keeps and (answer := self._asked_before(ask)) is not None:
                return answer
            shelf = books.shelves.get(ask.key)
            seed = shelf.best(ask, self.rules.policy) if shelf is not None else None
            if seed is not None:
                return self._grant(seed, ask, self.rules.lease_ttl_s)
            if ask.wait_s > 0 or ask.patient:
                return self._line_up(ask)
            return self._miss(ask)

    def _line_up(self, ask: Ask) -> Missed | Queued:
        books = self._ledger
        if len(books.waiters) >= self.rules.max_waiters or not books.has_room_for(ask.key):
            return self._miss(ask, "too many receivers wait already")
        if ask.keeps:
            return self._take_place(ask)
        shelf = books.shelves.get(ask.key)
        if ask.intent and (shelf is None or not shelf.has_hope(ask)):
            return self._miss(ask)
        books.add_waiter(ask, WAIT_GRACE_S)
        return Queued(ask.ticket)

    # --- receivers that keep their tickets -------------------------------------------------------------------------
    def _take_place(self, ask: Ask) -> Missed | Queued:
        """A place in the line, where waiting is worth it. It is answered at once, and served from its next question."""
        books = self._ledger
        verdict = prospects(books, ask, books.now)
        if not verdict.waits:
            return self._miss(ask, verdict.text)
        waiter = books.add_waiter(ask, 0.0)
        return self._parked(waiter, verdict)

    def _asked_before(self, ask: Ask) -> Granted | Missed | Queued | None:
        """What the receiver with this ticket has, or is to have now; None: the ticket is new."""
        books = self._ledger
        lease = books.leases.get(books.lease_of.get((ask.ticket, ask.key), ""))
        if lease is not None:
            waiter = books.waiters.get(ask.ticket)
            waited_s = None if waiter is None else books.now - waiter.since
            self._fetched(lease)
            seed = messages.parse_seed_address(lease.name)
            return Granted(seed, lease.user_id, self.rules.lease_ttl_s, waited_s, by_ticket=True)
        waiter = books.waiters.get(ask.ticket)
        if waiter is None:
            return None
        if (waiter.ask.key, waiter.ask.fingerprint) != (ask.key, ask.fingerprint) or waiter.result is not None:
            books.forget_ticket(ask.ticket)
            return None
        stated_s = None
        if not ask.patient and not waiter.ask.patient:
            # It states what is left of its wait; one that states the same again does not wait for longer.
            stated_s = min(waiter.bound_s, books.now - waiter.since + ask.wait_s)
        waiter.ask, waiter.attached = ask, True
        seed_now = books.shelves[ask.key].best(ask, self.rules.policy)
        if seed_now is not None:
            books.forget_ticket(ask.ticket)
            return dataclasses.replace(
                self._grant(seed_now, ask, self.rules.lease_ttl_s), waited_s=books.now - waiter.since
            )
        verdict = prospects(books, ask, waiter.since, waiter.number, stated_s)
        if not verdict.waits:
            return self._sent_away(waiter, verdict)
        left_s = verdict.bound_s - (books.now - waiter.since)
        books.due.set(("waiter", waiter.ticket, ""), books.now + left_s + WAIT_GRACE_S)
        return Queued(waiter.ticket, _place(waiter, verdict, books), left_s)

    async def park(self, ticket: str, *, hung_up: bool = False) -> Granted | Missed | Queued | None:
        """See the port."""
        with self._decision as books:
            waiter = books.waiters.get(ticket)
            if waiter is None:
                return None
            if isinstance(waiter.result, Granted):
                if not hung_up:
                    self._fetched(books.leases[waiter.result.user_id])
                return dataclasses.replace(waiter.result, waited_s=books.now - waiter.since)
            if waiter.result is not None:
                books.forget_ticket(ticket)
                if hung_up:
                    books.drop_intent(waiter.ask.key, waiter.ask.intent)
                return waiter.result
            verdict = prospects(books, waiter.ask, waiter.since, waiter.number, waiter.bound_s)
            if hung_up or verdict.waits:
                return self._parked(waiter, verdict)
            return self._sent_away(waiter, verdict)

    def _parked(self, waiter: Waiter, verdict: Verdict) -> Queued:
        books = self._ledger
        waiter.attached = False
        books.due.set(("waiter", waiter.ticket, ""), books.now + books.confirm_s)
        return Queued(waiter.ticket, _place(waiter, verdict, books), parked=True)

    def _sent_away(self, waiter: Waiter, verdict: Verdict) -> Missed:
        books = self._ledger
        books.forget_ticket(waiter.ticket)
        return dataclasses.replace(self._miss(waiter.ask, verdict.text), waited_s=books.now - waiter.since)

    def _fetched(self, lease: Lease) -> None:
        """The receiver that waited for ``lease`` is being answered."""
        self._ledger.forget_ticket(lease.ticket)
        lease.ticket = ""
        self._ledger.put_off(lease)

    # --- what both kinds share -------------------------------------------------------------------------------------
    def _miss(self, ask: Ask, text: str = "") -> Missed:
        ttl_s = self.rules.intent_ttl_of(ask)
        remembered = bool(ask.intent) and self._ledger.add_intent(ask.key, ask.intent, ask.fingerprint, ttl_s)
        shelf = self._ledger.shelves.get(ask.key)
        return Missed(remembered, misses.reason_for(shelf, ask), misses.others_for(shelf, ask), text)

    def _grant(self, seed: Seed, ask: Ask, ttl_s: float, ticket: str = "") -> Granted:
        books = self._ledger
        user_id = self.lease_ids.new(books.state_id, seed.name)
        question, ttl_s = (ask.ticket, books.confirm_s) if ask.keeps else ("", ttl_s)
        lease = Lease(user_id, seed.name, seed.key, ask.receiver, books.now, books.now + ttl_s, ticket)
        lease.fingerprint, lease.epoch = seed.fingerprint, seed.epoch
        lease.host = ask.labels.get("host", "")
        lease.question, lease.confirmed = question, not ask.keeps
        books.add_lease(lease)
        seed.turn = books.next_number()
        books.drop_intent(seed.key, ask.intent)
        books.rank(seed)
        return Granted(seed.address, user_id, self.rules.lease_ttl_s, by_ticket=ask.keeps)

    async def settle(self, ticket: str, *, leave: bool, loads: bool = True) -> Granted | Missed | Queued | None:
        """See the port."""
        with self._decision as books:
            waiter = books.waiters.get(ticket)
            if waiter is None:
                return None
            if waiter.result is None and not leave:
                return Queued(ticket)
            books.forget_ticket(ticket)
            if isinstance(waiter.result, Granted):
                self._fetched(books.leases[waiter.result.user_id])
                return dataclasses.replace(waiter.result, waited_s=books.now - waiter.since)
            if not loads:
                books.drop_intent(waiter.ask.key, waiter.ask.intent)
                return Missed()
            return waiter.result or self._miss(waiter.ask)

    async def release(self, seed: SeedAddress, user_id: str, outcome: Outcome | None) -> Released:
        """See the port."""
        with self._decision as books:
            lease = books.leases.get(user_id)
            if lease is None or not _names(seed, lease):
                if user_id in (noted := self._noted.get(str(seed), [])):
                    noted.remove(user_id)
                raise UnknownLease("no such lease")
            result = "released" if outcome is None else "ok" if outcome.ok else "failed"
            self._history.append(snapshot.PastFork.of(lease, books.now, result, outcome))
            if outcome is not None:
                self.observe(_reported(lease, outcome))
            if lease.key and (outcome.ok if outcome is not None else not lease.question):
                # Without a word: an older receiver's fork. One with a ticket says nothing only where it read nothing.
                reported_s = 0.0 if outcome is None else outcome.duration_s
                books.times_of(lease.key).add_fork(books.now - lease.granted_at, reported_s)
            if outcome is not None and lease.name in books.seeds:
                self._judge(books.seeds[lease.name], lease.who, outcome)
            self._drop_lease(lease)
            return Released(lease.key, books.now - lease.granted_at)

    def _judge(self, seed: Seed, receiver: str, outcome: Outcome) -> None:
        """Quarantine a seed when forks of several receivers fail in a row, longer each time, while that goes on.

        Receivers are counted, not failures: one that restarts again and again says nothing about the seed. After a
        quarantine the count begins anew, so that no receiver alone can prolong it.
        """
        if outcome.ok:
            seed.failed, seed.quarantines, seed.causes = (), 0, ""
            return
        if outcome.cause in SEED_NOT_TO_BLAME or outcome.side == "receiver":
            return
        others = tuple(each for each in seed.failed if each[0] != receiver)
        seed.failed = (*others, (receiver, outcome.cause or "unknown"))
        if len(seed.failed) < self.rules.failures:
            return
        backoff_s = min(self.rules.backoff_s * 2 ** min(seed.quarantines, 20), self.rules.max_backoff_s)
        seed.causes = ", ".join(f"{cause} ({who})" for who, cause in seed.failed)
        facts = {"seconds": backoff_s, "causes": seed.causes}
        seed.failed, seed.quarantines = (), seed.quarantines + 1
        seed.aside_until = self._ledger.now + backoff_s
        self._ledger.due.set(("blocked", seed.name, ""), max(seed.aside_until, seed.held_until))
        self._ledger.bereft.add(seed.key)
        self.observe(Event("seed_aside", seed.key, seed.name, f"{backoff_s:g}", facts))

    async def renew(self, seed: SeedAddress, user_id: str) -> None:
        """See the port."""
        with self._decision as books:
            lease = books.leases.get(user_id)
            if lease is None and self._is_from_earlier(user_id):
                if self._must_wait_for(str(seed)):
                    self._note(str(seed), user_id)
                    return
                lease = self._adopt(str(seed), user_id)
            if lease is None or not _names(seed, lease):
                raise UnknownLease("no such lease")
            lease.confirmed = True
            books.put_off(lease)

    # --- leases of an earlier state ------------------------------------------------------------------------------
    def _is_from_earlier(self, user_id: str) -> bool:
        """A lease id of a state before this one, within the time that such a lease can live."""
        books = self._ledger
        young = books.now < books.born_at + max(self.rules.lease_ttl_s, self.rules.recovery_hold_s)
        if not young:
            self._noted.clear()
        return young and state_of(user_id) not in ("", books.state_id) and len(books.leases) < self.rules.max_seeds

    def _must_wait_for(self, name: str) -> bool:
        """A lease on this seed can be checked only once the seed has reported what it was announced to."""
        return not self.lease_ids.provable and name not in self._ledger.seeds

    def _note(self, name: str, user_id: str) -> None:
        """Remember a lease that takes no slot as yet."""
        noted = self._noted.get(name)
        if noted is None:
            if len(self._noted) >= self.rules.max_seeds:
                raise UnknownLease("no such lease")
            noted = self._noted[name] = []
        if user_id not in noted:
            if len(noted) >= self.rules.max_slots:
                raise UnknownLease("no such lease")
            noted.append(user_id)

    def _take_noted(self, seed: Seed) -> None:
        for user_id in self._noted.pop(seed.name, ()):
            if self._is_from_earlier(user_id) and (lease := self._adopt(seed.name, user_id)) is not None:
                self._ledger.put_off(lease)

    def _adopt(self, name: str, user_id: str) -> Lease | None:
        """Take the lease over; None: anybody could have made it up, or the seed has no slot for it."""
        books = self._ledger
        seed = books.seeds.get(name)
        if self.lease_ids.provable:
            genuine = self.lease_ids.is_proven(user_id, name)
        else:
            genuine = seed is not None and state_of(user_id) == seed.earlier_state
        room = self.rules.max_slots if seed is None else seed.slots
        if not genuine or len(books.leases_of.get(name, ())) >= room:
            return None
        lease = Lease(user_id, name, seed.key if seed else "", "(earlier state)", books.now, books.now)
        books.add_lease(lease)
        if seed is not None:
            books.rank(seed)
        self.observe(Event("lease_adopted", lease.key, name))
        return lease

    # --- intents -------------------------------------------------------------------------------------------------
    async def intend(self, key: str, intent: str, fingerprint: str, ttl_s: float) -> None:
        """See the port."""
        with self._decision as books:
            if ttl_s <= 0:
                books.drop_intent(key, intent)
            elif not books.add_intent(key, intent, fingerprint, ttl_s):
                raise LimitReached("there are too many intents or keys already")

    # --- time ----------------------------------------------------------------------------------------------------
    async def sweep(self) -> float:
        """See the port."""
        with self._decision as books:
            upcoming = books.due.next()
            return float("inf") if upcoming is None else max(0.0, upcoming - books.now)

    def begin(self) -> Ledger:
        """Start a decision: do what is due."""
        books = self._ledger
        books.now = self._clock()
        for kind, name, other in books.due.due(books.now):
            if kind == "lease":
                self._expire_lease(books.leases[name])
            elif kind == "seed":
                # Its heartbeats are late, but it may live, and whoever reads from it may go on: its leases keep their
                # slots until they end, should it come back. Too many of them would be a way to fill the memory.
                keep = len(books.leases) <= self.rules.max_seeds
                self._drop_seed(books.seeds[name], "stale", keep_leases=keep)
            elif kind == "intent":
                books.drop_intent(name, other)
                self.observe(Event("intent_expired", name))
            elif kind == "blocked":
                self._unblock(books.seeds[name])
            elif kind == "presence":
                self._overdue(books.seeds[name])
            else:
                books.forget_ticket(name)
        return books

    def finish(self) -> None:
        """Tell those who now wait for nothing, and forget keys that nothing is known about."""
        books = self._ledger
        while books.bereft:
            key = books.bereft.pop()
            shelf = books.shelves.get(key)
            if shelf is None:
                continue
            for waiter in [each for each in shelf.line() if each.attached and (each.ask.intent or each.ask.patient)]:
                if not shelf.has_hope(waiter.ask):
                    shelf.unqueue(waiter)
                    text = "nobody loads the weights any more, and no seed that suits is serving"
                    waited_s = books.now - waiter.since
                    waiter.result = dataclasses.replace(self._miss(waiter.ask, text), waited_s=waited_s)
                    self.notify(waiter.ticket)
            books.left.add(key)
        while books.left:
            key = books.left.pop()
            shelf = books.shelves.get(key)
            if shelf is not None and shelf.is_empty():
                del books.shelves[key]

    def _expire_lease(self, lease: Lease) -> None:
        self.observe(Event("lease_expired", lease.key, lease.name, facts=_holder(lease, self._ledger.now)))
        if not lease.ticket:
            self._history.append(snapshot.PastFork.of(lease, self._ledger.now, "expired", None))
        self._drop_lease(lease)

    def _unblock(self, seed: Seed) -> None:
        until = max(seed.aside_until, seed.held_until)
        if until > self._ledger.now:
            self._ledger.due.set(("blocked", seed.name, ""), until)
        self._serve(seed)

    # --- steps that decisions share ------------------------------------------------------------------------------
    def _serve(self, seed: Seed) -> None:
        """Give the seed's free slots to those who wait for them, in order."""
        books = self._ledger
        books.rank(seed)
        shelf = books.shelves[seed.key]
        if not seed.is_open(books.now):
            return
        for waiter in shelf.first_for(seed, seed.slots - seed.leases):
            shelf.unqueue(waiter)
            waiter.result = self._grant(seed, waiter.ask, self.rules.claim_s, waiter.ticket)
            self.notify(waiter.ticket)

    def _drop_lease(self, lease: Lease) -> None:
        """Forget ``lease`` and give its slot to the next."""
        self._ledger.forget_ticket(lease.ticket)  # of the receiver that it waits for, if it does
        seed = self._ledger.remove_lease(lease)
        if seed is None:
            return
        if seed.draining and not seed.leases:
            self._drop_seed(seed, "withdrawn")
        else:
            self._serve(seed)

    def _drop_seed(self, seed: Seed, reason: str, *, keep_leases: bool = False) -> None:
        for lease in self._ledger.remove_seed(seed, keep_leases=keep_leases):
            facts = _holder(lease, self._ledger.now)
            self.observe(Event("lease_dropped", seed.key, seed.name, reason, facts))
        self.observe(Event("seed_dropped", seed.key, seed.name, reason))

    # --- what an earlier leader wrote ----------------------------------------------------------------------------
    def resume(self, state_id: str, born_at: float) -> None:
        """Continue an earlier leader's state, which began at ``born_at`` on the clock."""
        with self._decision as books:
            books.state_id, books.born_at = state_id, born_at

    def put_back(self, name: str, record: object) -> None:
        """Take over one record of an earlier leader, with its full time. Raises :class:`LimitReached`.

        Past forks must come in the order of their names, which are numbers.
        """
        with self._decision as books:
            if isinstance(record, Seed):
                books.put_back_seed(record)
            elif isinstance(record, Lease):
                books.put_back_lease(record)
            elif isinstance(record, Intent):
                books.put_back_intent(record)
            elif isinstance(record, KeyTimes):
                books.times[name] = record
            elif isinstance(record, snapshot.PastFork):
                self._history.put_back(int(name), record)
            else:
                raise TypeError(f"no such record: {type(record).__name__}")

    # --- for people ----------------------------------------------------------------------------------------------
    async def totals(self) -> dict[str, Totals]:
        """See the port."""
        with self._decision as books:
            return {key: shelf.totals(books.now) for key, shelf in books.shelves.items()}

    async def snapshot_slices(
        self, *, key: str | None = None, limit: int = 1000
    ) -> AsyncIterator[tuple[str, str | float | list[Any] | dict[str, Any]]]:
        """See the port."""
        with self._decision as books:
            head = snapshot.snapshot_head(books)
            lists = list(snapshot.snapshot_lists(books, self._history, key=key, limit=limit))
        for name, value in head.items():
            yield name, value
        for name, records, entry in lists:
            kind = dict if name == "keys" else list
            yield name, kind()
            for at in range(0, len(records), SLICE):
                await asyncio.sleep(0)
                now = self._clock()
                yield name, kind(entry(each, now) for each in records[at : at + SLICE])

    async def overview(self, *, key: str | None = None, limit: int = 100) -> dict[str, Any]:
        """See the port."""
        tally = overview.Tally()
        names = list(self._ledger.shelves)
        for at in range(0, len(names), overview.BATCH):
            with self._decision as books:
                for name in names[at : at + overview.BATCH]:
                    if (shelf := books.shelves.get(name)) is not None:
                        tally.add(name, shelf.totals(books.now))
            await asyncio.sleep(0)
        with self._decision as books:
            return overview.overview(books, self._history, tally, key=key, limit=limit)


class _Decision:
    """``with`` this around everything that reads or changes the state."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def __enter__(self) -> Ledger:
        return self._store.begin()

    def __exit__(self, *_: object) -> None:
        self._store.finish()


def _names(seed: SeedAddress, lease: Lease) -> bool:
    """``seed`` is the one of ``lease``. The rank does not count: newer receivers may leave it out."""
    return lease.name.rpartition(":")[0] == f"{seed.host}:{seed.port}"


def _holder(lease: Lease, now: float) -> dict[str, Any]:
    return {"receiver": lease.who, "held_s": round(now - lease.granted_at, 1)}


def _reported(lease: Lease, outcome: Outcome) -> Event:
    """One completed or failed fork, for the log."""
    facts: dict[str, Any] = {"receiver": lease.who, "nbytes": outcome.nbytes}
    if outcome.duration_s:
        facts["seconds"] = round(outcome.duration_s, 3)
        if outcome.nbytes:
            facts["gb_per_s"] = round(outcome.nbytes / outcome.duration_s / 1e9, 3)
    if not outcome.ok:
        facts |= {"cause": outcome.cause or "unknown", "side": outcome.side or "unknown"}
    if outcome.lane:
        facts["lane"] = outcome.lane
    return Event("fork_ok" if outcome.ok else "fork_failed", lease.key, lease.name, facts=facts)


def _place(waiter: Waiter, verdict: Verdict, books: Ledger) -> Waiting:
    """What a receiver in the line is told."""
    waiter.bound_s = verdict.bound_s
    position = books.shelves[waiter.ask.key].position(waiter.ask, waiter.number)
    return Waiting(position, verdict.bound_s, verdict.expected_s, verdict.reason)


def _new_life(seed: Seed | Lease, new: Announcement) -> str:
    """Why ``new`` is not the seed that is known under this address any more; empty where it still is."""
    if seed.key != new.key:
        return "rekeyed"
    if new.epoch and seed.epoch and new.epoch != seed.epoch:
        return "new epoch"
    if new.fingerprint != seed.fingerprint:
        return "new fingerprint"
    return ""
