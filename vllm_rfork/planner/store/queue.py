"""Requests for a seed: granted, queued or sent to storage; and what becomes of those in the queue.

There are two kinds of waiting receivers. Older ones wait within one request, under a ticket that the planner makes up.
One that keeps its own ticket sends the request again every few seconds: it is parked in between, and is served only
while a request of it is open.
"""

from __future__ import annotations

import dataclasses

from vllm_rfork.messages import Waiting, parse_seed_address
from vllm_rfork.planner.store.base import Ask, Granted, Missed, Queued
from vllm_rfork.planner.store.estimates import Verdict
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.grants import Grants
from vllm_rfork.planner.store.kept_keys import name_key
from vllm_rfork.planner.store.prospects import prospects
from vllm_rfork.planner.store.records import Waiter

#: Seconds after the end of its wait at which a receiver that nobody settled is forgotten.
WAIT_GRACE_S = 10.0


class Queue:
    """Decides about receivers that ask for a seed."""

    def __init__(self, fleet: FleetState, grants: Grants) -> None:
        self._fleet = fleet
        self._rules = fleet.rules
        self._grants = grants

    def acquire(self, ask: Ask) -> Granted | Missed | Queued:
        """Give ``ask`` a seed, a place in the queue, or neither."""
        if ask.keeps and (answer := self._asked_before(ask)) is not None:
            return answer
        name_key(self._fleet, ask.key, ask.names)
        seed = self._grants.best_seed(ask)
        if seed is not None:
            return self._grants.grant(seed, ask)
        if ask.wait_s > 0 or ask.patient:
            return self._enqueue(ask)
        return self._grants.miss(ask)

    def settle(self, ticket: str, *, leave: bool, loads: bool) -> Granted | Missed | Queued | None:
        """Fetch the result of a receiver that waits within one request, or take it out of the queue (``leave``)."""
        fleet = self._fleet
        waiter = fleet.waiters.get(ticket)
        if waiter is None:
            return None
        if waiter.result is None and not leave:
            return Queued(ticket)
        fleet.forget_ticket(ticket)
        if isinstance(waiter.result, Granted):
            return self._fetch(waiter, waiter.result)
        if not loads:
            fleet.drop_intent(waiter.ask.key, waiter.ask.intent)
            return Missed()
        return waiter.result or self._grants.miss(waiter.ask)

    def park(self, ticket: str, *, hung_up: bool) -> Granted | Missed | Queued | None:
        """Fetch the result of a receiver that keeps its ticket, or leave it in the queue until it asks again."""
        fleet = self._fleet
        waiter = fleet.waiters.get(ticket)
        if waiter is None:
            return None
        if isinstance(waiter.result, Granted):
            if hung_up:
                return dataclasses.replace(waiter.result, waited_s=self._waited_s(waiter))
            return self._fetch(waiter, waiter.result)
        if waiter.result is not None:
            fleet.forget_ticket(ticket)
            if hung_up:
                fleet.drop_intent(waiter.ask.key, waiter.ask.intent)
            return waiter.result
        verdict = prospects(fleet, waiter.ask, waiter.since, waiter.number, waiter.bound_s)
        if hung_up or verdict.waits:
            return self._parked(waiter, verdict)
        return self._sent_away(waiter, verdict)

    # --- steps ---------------------------------------------------------------------------------------------------
    def _enqueue(self, ask: Ask) -> Missed | Queued:
        fleet = self._fleet
        if len(fleet.waiters) >= self._rules.max_waiters or not fleet.has_room_for(ask.key):
            return self._grants.miss(ask, "too many receivers wait already")
        if ask.keeps:
            verdict = prospects(fleet, ask, fleet.now)
            if not verdict.waits:
                return self._grants.miss(ask, verdict.text)
            # Answered at once, and served from its next request on.
            return self._parked(fleet.add_waiter(ask, 0.0), verdict)
        key_state = fleet.keys.get(ask.key)
        if ask.intent and (key_state is None or not key_state.has_hope(ask)):
            return self._grants.miss(ask)
        fleet.add_waiter(ask, WAIT_GRACE_S)
        return Queued(ask.ticket)

    def _asked_before(self, ask: Ask) -> Granted | Missed | Queued | None:
        """Return what the receiver with this ticket has or gets now; None if the ticket is new."""
        fleet = self._fleet
        waiter = fleet.waiters.get(ask.ticket)
        lease = fleet.leases.get(fleet.lease_of.get((ask.ticket, ask.key), ""))
        if lease is not None:
            self._grants.fetched(lease)
            waited_s = None if waiter is None else self._waited_s(waiter)
            return Granted(
                parse_seed_address(lease.name), lease.user_id, self._rules.lease_ttl_s, waited_s, by_ticket=True
            )
        if waiter is None:
            return None
        if (waiter.ask.key, waiter.ask.fingerprint) != (ask.key, ask.fingerprint) or waiter.result is not None:
            fleet.forget_ticket(ask.ticket)
            return None
        return self._wait_on(waiter, ask)

    def _wait_on(self, waiter: Waiter, ask: Ask) -> Granted | Missed | Queued:
        """Serve a receiver that was parked, or let it wait on."""
        fleet, waited_s = self._fleet, self._waited_s(waiter)
        stated_s = None
        if not ask.patient and not waiter.ask.patient:
            # It states what is left of its wait; one that states the same again does not wait for longer.
            stated_s = min(waiter.bound_s, waited_s + ask.wait_s)
        waiter.ask, waiter.attached = ask, True
        seed = self._grants.best_seed(ask)
        if seed is not None:
            fleet.forget_ticket(ask.ticket)
            return dataclasses.replace(self._grants.grant(seed, ask), waited_s=waited_s)
        verdict = prospects(fleet, ask, waiter.since, waiter.number, stated_s)
        if not verdict.waits:
            return self._sent_away(waiter, verdict)
        left_s = verdict.bound_s - waited_s
        fleet.due.set(("waiter", waiter.ticket, ""), fleet.now + left_s + WAIT_GRACE_S)
        return Queued(waiter.ticket, self._place(waiter, verdict), left_s)

    def _parked(self, waiter: Waiter, verdict: Verdict) -> Queued:
        waiter.attached = False
        self._fleet.due.set(("waiter", waiter.ticket, ""), self._fleet.now + self._rules.confirmation_s)
        return Queued(waiter.ticket, self._place(waiter, verdict), parked=True)

    def _sent_away(self, waiter: Waiter, verdict: Verdict) -> Missed:
        self._fleet.forget_ticket(waiter.ticket)
        return self._grants.miss(waiter.ask, verdict.text, self._waited_s(waiter))

    def _fetch(self, waiter: Waiter, result: Granted) -> Granted:
        self._grants.fetched(self._fleet.leases[result.user_id])
        return dataclasses.replace(result, waited_s=self._waited_s(waiter))

    def _place(self, waiter: Waiter, verdict: Verdict) -> Waiting:
        """Return the answer for a receiver in the queue."""
        waiter.bound_s = verdict.bound_s
        position = self._fleet.keys[waiter.ask.key].position(waiter.ask, waiter.number)
        return Waiting(position, verdict.bound_s, verdict.expected_s, verdict.reason)

    def _waited_s(self, waiter: Waiter) -> float:
        return self._fleet.now - waiter.since
