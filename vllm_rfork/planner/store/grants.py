"""Grants and ends leases: the steps that all decisions share."""

from __future__ import annotations

from typing import Any

from vllm_rfork.messages.metering import Served
from vllm_rfork.planner.store import misses
from vllm_rfork.planner.store.base import Ask, Event, Granted, Missed, Outcome, Released, Store
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.history import History, PastFork
from vllm_rfork.planner.store.kept_keys import times_of, use_of
from vllm_rfork.planner.store.quarantine import record_outcome
from vllm_rfork.planner.store.records import Intent, Lease, Place, Seed, Waiter

#: Seeds that one decision drops because they are stale; the next ones drop the others.
STALE_BATCH = 500


class Grants:
    """Gives free slots to receivers, and takes them back.

    Args:
        fleet: the state that is changed.
        store: its ``observe``, ``notify`` and ``lease_ids`` are used.
    """

    def __init__(self, fleet: FleetState, history: History, store: Store) -> None:
        self._fleet = fleet
        self._rules = fleet.rules
        self.history = history
        self._store = store

    # --- a receiver asks -----------------------------------------------------------------------------------------
    def best_seed(self, ask: Ask) -> Seed | None:
        """Return the seed that ``ask`` should get now."""
        key_state = self._fleet.keys.get(ask.key)
        if key_state is None:
            return None
        for _ in range(STALE_BATCH):
            seed = key_state.best(ask, self._rules.policy)
            if seed is None or seed.stale_at > self._fleet.now:
                return seed
            self.drop_stale_seed(seed)
        return None

    def grant(self, seed: Seed, ask: Ask, waiter: Waiter | None = None) -> Granted:
        """Lease ``seed`` to the receiver of ``ask``, or to ``waiter``, who has to fetch the lease soon."""
        fleet, rules = self._fleet, self._rules
        user_id = self._store.lease_ids.new(fleet.state_id, seed.name)
        ttl_s = rules.confirmation_s if ask.keeps else rules.lease_ttl_s if waiter is None else rules.claim_s
        lease = Lease(
            user_id,
            seed.name,
            seed.key,
            ask.receiver,
            fleet.now,
            fleet.now + ttl_s,
            "" if waiter is None else waiter.ticket,
            seed.fingerprint,
            seed.epoch,
            ask.labels.get("host", ""),
            ask.ticket if ask.keeps else "",
            not ask.keeps,
            ask.intent,
            ask.labels.get("pod", ""),
        )
        fleet.add_lease(lease)
        seed.turn = fleet.next_number()
        fleet.drop_intent(seed.key, ask.intent)
        fleet.rank(seed)
        times = fleet.times.get(seed.key)
        load_s = 0.0 if times is None else times.load_s
        return Granted(seed.address, user_id, rules.lease_ttl_s, by_ticket=ask.keeps, load_s=load_s)

    def miss(self, ask: Ask, text: str = "", waited_s: float | None = None) -> Missed:
        """Send the receiver of ``ask`` to storage, and record its intent."""
        fleet, ttl_s = self._fleet, self._rules.intent_ttl_of(ask)
        use_of(fleet, ask.key).loaded += 1
        intent = Intent(ask.key, ask.intent, ask.fingerprint, ttl_s, fleet.now, *Place.of(ask))
        recorded = bool(ask.intent) and fleet.add_intent(intent)
        key_state = fleet.keys.get(ask.key)
        return Missed(recorded, misses.reason_for(key_state, ask), misses.others_for(key_state, ask), text, waited_s)

    def fetched(self, lease: Lease) -> None:
        """Start the full TTL of ``lease``: the receiver that waited for it is being answered."""
        self._fleet.forget_ticket(lease.unfetched_ticket)
        lease.unfetched_ticket = ""
        self._fleet.extend(lease)

    # --- slots become free ---------------------------------------------------------------------------------------
    def serve_waiters(self, seed: Seed) -> None:
        """Give the free slots of ``seed`` to those who wait for them, in order."""
        fleet = self._fleet
        fleet.rank(seed)
        key_state = fleet.keys[seed.key]
        if not seed.is_open(fleet.now):
            return
        for waiter in key_state.first_for(seed, seed.slots - seed.leases):
            key_state.dequeue(waiter)
            waiter.result = self.grant(seed, waiter.ask, waiter)
            self._store.notify(waiter.ticket)

    def end_quarantine(self, seed: Seed) -> None:
        """Grant ``seed`` again, unless it is blocked until later."""
        until = max(seed.quarantined_until, seed.recovering_until)
        if until > self._fleet.now:
            self._fleet.due.set(("quarantine", seed.name, ""), until)
        self.serve_waiters(seed)

    # --- leases end ----------------------------------------------------------------------------------------------
    def release(self, lease: Lease, outcome: Outcome | None) -> Released:
        """End ``lease`` as its receiver asked, and use what it reports."""
        fleet = self._fleet
        held_s = fleet.now - lease.granted_at
        result = "released" if outcome is None else "ok" if outcome.ok else "failed"
        self.history.append(PastFork.of(lease, fleet.now, result, outcome))
        if outcome is not None:
            self._store.observe(_fork_event(lease, outcome))
        saved_s = 0.0
        if lease.key and (outcome.ok if outcome is not None else not lease.ticket):
            # Older receivers report nothing. One with a ticket reports nothing only if it read nothing.
            times, reported_s = times_of(fleet, lease.key), 0.0 if outcome is None else outcome.duration_s
            times.add_fork(held_s, reported_s)
            saved_s = use_of(fleet, lease.key).add_fork(reported_s, times.load_s)
        seed = fleet.seeds.get(lease.name)
        if outcome is not None and seed is not None:
            if outcome.ok:
                seed.served = Served(seed.served.forks + 1, seed.served.nbytes + outcome.nbytes)
            if event := record_outcome(fleet, seed, lease.who, outcome):
                self._store.observe(event)
        self.drop_lease(lease)
        return Released(lease.key, held_s, saved_s)

    def expire(self, lease: Lease) -> None:
        """End ``lease``, which was not renewed in time."""
        self._store.observe(Event("lease_expired", lease.key, lease.name, facts=_holder(lease, self._fleet.now)))
        if not lease.unfetched_ticket:
            self.history.append(PastFork.of(lease, self._fleet.now, "expired", None))
        self.drop_lease(lease)

    def drop_lease(self, lease: Lease) -> None:
        """Forget ``lease`` and give its slot to the next receiver."""
        self._fleet.forget_ticket(lease.unfetched_ticket)
        seed = self._fleet.remove_lease(lease)
        if seed is None:
            return
        if seed.draining and not seed.leases:
            self.drop_seed(seed, "withdrawn")
        else:
            self.serve_waiters(seed)

    # --- seeds end -----------------------------------------------------------------------------------------------
    def drop_seed(self, seed: Seed, reason: str, *, keep_leases: bool = False) -> None:
        """Forget ``seed`` and its leases; with ``keep_leases`` those that were fetched stay."""
        for lease in self._fleet.remove_seed(seed, keep_leases=keep_leases):
            facts = _holder(lease, self._fleet.now)
            self._store.observe(Event("lease_dropped", seed.key, seed.name, reason, facts))
        self._store.observe(Event("seed_dropped", seed.key, seed.name, reason))

    def drop_stale_seed(self, seed: Seed) -> None:
        """Forget ``seed``, whose heartbeats are late.

        It may live, and its readers may go on: its leases keep their slots until they end, in case it comes back. Too
        many of them would be a way to fill the memory.
        """
        self.drop_seed(seed, "stale", keep_leases=len(self._fleet.leases) <= self._rules.max_seeds)

    # --- the end of a decision -----------------------------------------------------------------------------------
    def finish(self) -> None:
        """Settle those who wait for nothing now, and forget keys about which nothing is known."""
        fleet = self._fleet
        while fleet.keys_to_recheck:
            key = fleet.keys_to_recheck.pop()
            key_state = fleet.keys.get(key)
            if key_state is None:
                continue
            for waiter in list(key_state.waiters()):
                loads = waiter.attached and (waiter.ask.intent or waiter.ask.patient)
                if loads and not key_state.has_hope(waiter.ask):
                    key_state.dequeue(waiter)
                    text = "nobody loads the weights any more, and no suitable seed is serving"
                    waiter.result = self.miss(waiter.ask, text, fleet.now - waiter.since)
                    self._store.notify(waiter.ticket)
            fleet.keys_to_prune.add(key)
        while fleet.keys_to_prune:
            key = fleet.keys_to_prune.pop()
            key_state = fleet.keys.get(key)
            if key_state is not None and key_state.is_empty():
                del fleet.keys[key]


def _holder(lease: Lease, now: float) -> dict[str, Any]:
    return {"receiver": lease.who, "held_s": round(now - lease.granted_at, 1)}


def _fork_event(lease: Lease, outcome: Outcome) -> Event:
    """Return one completed or failed fork, for the log."""
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
