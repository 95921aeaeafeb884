"""What a receiver may expect of the fleet as it stands: the rules of ``estimates`` over the books. Changes nothing."""

from __future__ import annotations

from vllm_rfork.planner.store.base import Ask
from vllm_rfork.planner.store.estimates import KeyTimes, Outlook, Verdict, judge
from vllm_rfork.planner.store.ledger import Ledger

#: A wait that has this many seconds left is over.
_NOTHING_LEFT_S = 0.05


def prospects(
    books: Ledger, ask: Ask, since: float, number: int | None = None, stated_s: float | None = None
) -> Verdict:
    """Whether a receiver that began to wait at ``since`` is to wait on, and for what.

    Args:
        number: its place in the queue as a :class:`Waiter` has it; None: it is not there yet.
        stated_s: the wait that it has stated, from its start; None: ``ask`` states it now.
    """
    rules, now = books.rules, books.now
    shelf = books.shelves.get(ask.key)
    if shelf is None or not shelf.has_hope(ask):
        return Verdict(False, 0.0, None, "", "no seed that suits is serving, and nobody loads the weights")
    ready, seeds, held = shelf.slots_for(ask)
    loading_since = shelf.oldest_loader(ask)
    outlook = Outlook(
        position=shelf.position(ask) if number is None else shelf.position(ask, number),
        seeds=seeds,
        slots=ready,
        held_slots=held,
        held_s=max(0.0, shelf.held_until - now),
        loading_s=None if loading_since is None else max(0.0, now - loading_since),
        new_slots=min(rules.slots, rules.max_slots),
        grows=bool(ask.intent),
    )
    times = books.times.get(ask.key) or KeyTimes()
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
