"""The expected wait of one receiver: the rules of ``estimates`` applied to the fleet. Changes nothing."""

from __future__ import annotations

from vllm_rfork.planner.store.base import Ask
from vllm_rfork.planner.store.estimates import KeyTimes, Outlook, Verdict, judge
from vllm_rfork.planner.store.fleet_state import FleetState

#: A wait that has this many seconds left is over.
_NOTHING_LEFT_S = 0.05


def prospects(
    fleet: FleetState, ask: Ask, since: float, number: int | None = None, stated_s: float | None = None
) -> Verdict:
    """Decide whether a receiver that began to wait at ``since`` should wait on, and for what.

    Args:
        number: its place in the queue as a :class:`Waiter` has it; None: it is not in it yet.
        stated_s: the total wait that it stated; None: ``ask`` states it now.
    """
    rules, now = fleet.rules, fleet.now
    key_state = fleet.keys.get(ask.key)
    if key_state is None or not key_state.has_hope(ask):
        return Verdict(False, 0.0, None, "", "no suitable seed is serving, and nobody loads the weights")
    ready, seeds, withheld = key_state.slots_for(ask)
    loading_since = key_state.oldest_load(ask)
    outlook = Outlook(
        position=key_state.position(ask) if number is None else key_state.position(ask, number),
        seeds=seeds,
        slots=ready,
        withheld_slots=withheld,
        withheld_s=max(0.0, key_state.withheld_until - now),
        loading_s=None if loading_since is None else max(0.0, now - loading_since),
        new_slots=min(rules.slots, rules.max_slots),
        grows=bool(ask.intent),
    )
    times = fleet.times.get(ask.key) or KeyTimes()
    waited_s = now - since
    if ask.patient:
        waited_s += _NOTHING_LEFT_S if waited_s else 0.0
        return judge(times, outlook, waited_s, default_s=rules.default_wait_s, max_s=rules.max_wait_s)
    # The receiver has set its wait itself.
    bound_s = waited_s + ask.wait_s if stated_s is None else stated_s
    verdict = judge(times, outlook, 0.0, default_s=bound_s, max_s=bound_s)
    if bound_s - waited_s > _NOTHING_LEFT_S:
        return Verdict(True, bound_s, verdict.expected_s, verdict.reason)
    return Verdict(False, bound_s, verdict.expected_s, verdict.reason, "the wait that it stated is over")
