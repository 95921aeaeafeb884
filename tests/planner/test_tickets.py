"""Receivers that keep their tickets: one lease for each, a place in the queue, and waits that are worth it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.planner.conftest import Fleet, MakeFleet, seed, snapshot
from vllm_rfork.planner.store.base import Granted, Missed, Outcome, Queued
from vllm_rfork.planner.store.errors import StillLeased, UnknownLease


async def ask(fleet: Fleet, name: str, **more: Any) -> Granted | Missed | Queued:
    """``name``'s question; asked again it is the same one."""
    more = {"ticket": f"ticket of {name}", "keeps": True, "patient": True, "intent": name, "receiver": name, **more}
    if more.get("wait_s") is not None:
        more["patient"] = False
    return await fleet.ask(**more)


async def waits(fleet: Fleet, name: str, **more: Any) -> tuple[int, float, str]:
    """Ask twice, so that the receiver is in the queue and is served; its place, the bound and the reason."""
    first = await ask(fleet, name, **more)
    assert isinstance(first, Queued), first
    assert first.parked, "the first answer comes at once"
    second = await ask(fleet, name, **more)
    assert isinstance(second, Queued), second
    assert not second.parked
    assert second.place is not None
    return second.place.position, second.place.bound_s, second.place.reason


async def fetched(fleet: Fleet, name: str) -> Granted | Missed | Queued | None:
    """What a held question of ``name`` is answered when the store has called."""
    return await fleet.store.settle(f"ticket of {name}", leave=False)


async def granted(fleet: Fleet, name: str) -> Granted:
    found = await ask(fleet, name)
    assert isinstance(found, Granted), found
    return found


# --- one ticket, one lease -------------------------------------------------------------------------------------------


async def test_a_ticket_that_is_asked_again_is_given_the_same_lease(fleet: Fleet) -> None:
    await fleet.announce(1, slots=4)
    first = await granted(fleet, "a")
    assert await granted(fleet, "a") == first
    assert (await fleet.seed_entry(1))["leases"] == 1
    assert (await granted(fleet, "b")).user_id != first.user_id
    await fleet.store.renew(first.seed, first.user_id)
    assert await granted(fleet, "a") == first, "confirmed or not"
    assert (await fleet.seed_entry(1))["leases"] == 2


async def test_a_lease_that_is_gone_before_its_receiver_fetched_it_leaves_nothing_behind(fleet: Fleet) -> None:
    await fleet.announce(1, slots=1)
    held = await granted(fleet, "a")
    await waits(fleet, "b")
    await fleet.release(held)
    lease = await fleet.store.park("ticket of b", hung_up=True)
    assert isinstance(lease, Granted)
    await fleet.release(lease)
    assert await fetched(fleet, "b") is None
    assert (await granted(fleet, "b")).user_id != lease.user_id


@pytest.mark.parametrize("left", ["what is left", "the whole"])
async def test_a_stated_wait_is_what_it_was_at_its_start(fleet: Fleet, left: str) -> None:
    await fleet.announce(1, slots=1)
    held = await granted(fleet, "a")
    await fleet.store.renew(held.seed, held.user_id)
    assert (await waits(fleet, "b", wait_s=25.0))[:2] == (1, 25.0)
    for waited_s in (10.0, 20.0):
        fleet.clock.pass_(10)
        parked = await fleet.store.park("ticket of b")
        assert isinstance(parked, Queued)
        assert parked.place is not None
        assert parked.place.bound_s == 25
        again = await ask(fleet, "b", wait_s=25.0 - waited_s if left == "what is left" else 25.0)
        assert isinstance(again, Queued)
        assert again.place is not None
        assert (again.place.bound_s, again.left_s) == (25, 25 - waited_s)
    fleet.clock.pass_(5)
    assert await fleet.store.park("ticket of b") == Missed(intent=True)


async def test_a_ticket_is_of_one_key(fleet: Fleet) -> None:
    await fleet.announce(1, slots=4)
    await fleet.announce(2, key="other", slots=4)
    first = await granted(fleet, "a")
    other = await ask(fleet, "a", key="other")
    assert isinstance(other, Granted)
    assert (first.seed, other.seed) == (seed(1), seed(2))


async def test_a_released_lease_is_not_given_again(fleet: Fleet) -> None:
    await fleet.announce(1, slots=4)
    first = await granted(fleet, "a")
    await fleet.release(first, Outcome(True))
    assert (await granted(fleet, "a")).user_id != first.user_id


async def test_a_lease_that_is_not_confirmed_ends_after_ten_seconds_and_the_next_has_its_slot(fleet: Fleet) -> None:
    await fleet.announce(1)
    lost = await granted(fleet, "dead")
    assert (await waits(fleet, "b"))[2] == "busy"
    fleet.clock.pass_(9.9)
    assert isinstance(await ask(fleet, "b"), Queued)
    fleet.clock.pass_(0.1)
    await fleet.store.sweep()
    assert isinstance(await fetched(fleet, "b"), Granted)
    with pytest.raises(UnknownLease):
        await fleet.store.renew(lost.seed, lost.user_id)


async def test_a_confirmed_lease_lives_for_its_ttl(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await granted(fleet, "a")
    fleet.clock.pass_(5)
    await fleet.store.renew(lease.seed, lease.user_id)
    fleet.clock.pass_(50)
    await fleet.announce(1)
    await fleet.store.renew(lease.seed, lease.user_id)


async def test_a_lease_of_a_receiver_that_waited_has_to_be_confirmed_as_well(fleet: Fleet) -> None:
    await fleet.announce(1)
    held = await fleet.lease()
    await waits(fleet, "a")
    await fleet.release(held)
    first = await fetched(fleet, "a")
    assert isinstance(first, Granted)
    assert await granted(fleet, "a") == first, "the answer may have been lost"
    fleet.clock.pass_(10)
    with pytest.raises(UnknownLease):
        await fleet.store.renew(first.seed, first.user_id)


async def test_a_receiver_without_a_ticket_keeps_its_lease_for_a_ttl(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    fleet.clock.pass_(50)
    await fleet.announce(1)
    await fleet.store.renew(lease.seed, lease.user_id)


# --- the queue -------------------------------------------------------------------------------------------------------


async def test_positions_are_counted_and_move_up(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    assert [(await waits(fleet, name))[0] for name in "abc"] == [1, 2, 3]
    await fleet.release(lease)
    assert isinstance(await fetched(fleet, "a"), Granted)
    assert [(await waits_again(fleet, name)) for name in "bc"] == [1, 2]


async def waits_again(fleet: Fleet, name: str) -> int:
    found = await ask(fleet, name)
    assert isinstance(found, Queued)
    assert found.place is not None
    return found.place.position


async def test_a_place_counts_those_who_compete_for_the_same_seeds(fleet: Fleet) -> None:
    await fleet.announce(1, fingerprint="f")
    await fleet.announce(2, fingerprint="g")
    for print_ in "fg":
        await fleet.lease(fingerprint=print_)
    assert (await waits(fleet, "a", fingerprint="f"))[0] == 1
    assert (await waits(fleet, "b", fingerprint="g"))[0] == 1
    assert (await waits(fleet, "c", fingerprint="f"))[0] == 2


async def test_a_place_is_kept_between_two_questions_and_lost_when_none_follows(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    await waits(fleet, "a")
    await waits(fleet, "b")
    assert isinstance(await fleet.store.park("ticket of a"), Queued)
    fleet.clock.pass_(9)
    assert await waits_again(fleet, "a") == 1
    assert isinstance(await fleet.store.park("ticket of a"), Queued)
    fleet.clock.pass_(10)
    await fleet.store.sweep()
    assert await waits_again(fleet, "b") == 1
    await fleet.release(lease)
    assert isinstance(await fetched(fleet, "b"), Granted)


async def test_nobody_is_given_a_seed_between_two_questions(fleet: Fleet) -> None:
    """Who does not ask again is gone, and its lease would be lost for a while."""
    await fleet.announce(1)
    lease = await fleet.lease()
    await waits(fleet, "a")
    await waits(fleet, "b")
    await fleet.store.park("ticket of a", hung_up=True)
    await fleet.release(lease)
    assert isinstance(await fetched(fleet, "b"), Granted)
    assert await waits_again(fleet, "a") == 1


async def test_a_lease_that_was_granted_while_the_receiver_hung_up_is_there_when_it_asks_again(fleet: Fleet) -> None:
    await fleet.announce(1)
    lease = await fleet.lease()
    await waits(fleet, "a")
    await fleet.release(lease)
    hung_up = await fleet.store.park("ticket of a", hung_up=True)
    assert isinstance(hung_up, Granted)
    assert await granted(fleet, "a") == hung_up
    assert (await fleet.seed_entry(1))["leases"] == 1


async def test_a_stated_wait_is_the_bound_and_is_sliced_like_others(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.lease()
    assert await waits(fleet, "a", wait_s=30.0) == (1, 30.0, "busy")
    fleet.clock.pass_(10)
    again = await ask(fleet, "a", wait_s=20.0)
    assert isinstance(again, Queued)
    assert again.place is not None
    assert (again.place.bound_s, again.left_s) == (30.0, 20.0)
    fleet.clock.pass_(20)
    missed = await ask(fleet, "a", wait_s=0.0)
    assert isinstance(missed, Missed)
    assert (missed.intent, missed.waited_s) == (True, 30.0)
    assert (await ask(fleet, "b", wait_s=0.0)) == Missed(True), "who states 0 does not wait"


async def test_a_full_queue_takes_nobody(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_waiters=1)
    await fleet.announce(1)
    await fleet.lease()
    await waits(fleet, "a")
    missed = await ask(fleet, "b")
    assert isinstance(missed, Missed)
    assert "too many" in missed.text


# --- pending loaders -------------------------------------------------------------------------------------------------


async def test_in_a_cold_fleet_one_loads_and_the_others_wait_for_it(fleet: Fleet) -> None:
    first = await ask(fleet, "loader")
    assert first == Missed(True)
    for number, name in enumerate("abcdefghi", start=1):
        assert await waits(fleet, name) == (number, 120.0, "loading")
    fleet.clock.pass_(20)
    await fleet.store.intend("k", "loader", "", 30)
    await fleet.announce(1, slots=4, intent="loader")
    served = [await fetched(fleet, name) for name in "abcdefghi"]
    assert [type(each) for each in served] == [Granted] * 4 + [Queued] * 5
    assert await waits_again(fleet, "e") == 1
    assert len(await intents(fleet)) == 0


async def intents(fleet: Fleet) -> list[str]:
    return [each["intent"] for each in (await snapshot(fleet.store))["intents"]]


@pytest.mark.parametrize("how", ["dies", "takes it back"])
async def test_when_the_loader_is_gone_exactly_one_of_those_who_wait_loads(fleet: Fleet, how: str) -> None:
    await ask(fleet, "loader")
    for name in "abc":
        await waits(fleet, name)
    if how == "dies":
        fleet.clock.pass_(29.9)
        await fleet.store.sweep()
        assert isinstance(await fetched(fleet, "a"), Queued)
        fleet.clock.pass_(0.1)
        await fleet.store.sweep()
    else:
        await fleet.store.intend("k", "loader", "", 0)
    told = [await fetched(fleet, name) for name in "abc"]
    assert [type(each) for each in told] == [Missed, Queued, Queued]
    assert isinstance(told[0], Missed)
    assert told[0].intent
    assert "nobody loads" in told[0].text
    assert await intents(fleet) == ["a"]
    assert await waits_again(fleet, "b") == 1


async def test_a_receiver_that_hung_up_is_not_made_the_loader(fleet: Fleet) -> None:
    await ask(fleet, "loader")
    for name in "ab":
        await waits(fleet, name)
    await fleet.store.park("ticket of a", hung_up=True)
    await fleet.store.intend("k", "loader", "", 0)
    assert isinstance(await fetched(fleet, "b"), Missed)
    assert await intents(fleet) == ["b"]


async def test_a_loader_that_hung_up_before_it_heard_of_it_makes_room_for_the_next(fleet: Fleet) -> None:
    await ask(fleet, "loader")
    for name in "ab":
        await waits(fleet, name)
    await fleet.store.intend("k", "loader", "", 0)
    assert await intents(fleet) == ["a"]
    await fleet.store.park("ticket of a", hung_up=True)
    assert isinstance(await fetched(fleet, "b"), Missed)
    assert await intents(fleet) == ["b"]


async def test_who_will_be_no_seed_does_not_wait_for_nothing(fleet: Fleet) -> None:
    assert await ask(fleet, "a", intent="") == Missed()
    await ask(fleet, "loader")
    await waits(fleet, "b", intent="")
    await fleet.store.intend("k", "loader", "", 0)
    assert await fetched(fleet, "b") == Missed()


async def test_a_seed_that_goes_sends_those_who_waited_for_it_to_storage(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.lease()
    await waits(fleet, "a")
    with pytest.raises(StillLeased):
        await fleet.store.withdraw("k", seed(1))
    assert isinstance(await fetched(fleet, "a"), Missed)


# --- how long waiting is worth it ------------------------------------------------------------------------------------


async def measured(fleet: Fleet, *, load_s: float, hold_s: float | None = None) -> None:
    """One seed with one slot; a load of the key took so long, and a fork held its slot for so long."""
    await fleet.store.intend("k", "first", "", 3600)
    fleet.clock.pass_(load_s)
    await fleet.announce(1, intent="first")
    if hold_s is not None:
        lease = await fleet.lease()
        fleet.clock.pass_(hold_s)
        await fleet.announce(1)
        await fleet.release(lease, Outcome(True, 1, hold_s / 2))


async def test_the_bound_is_what_a_load_took(fleet: Fleet) -> None:
    await measured(fleet, load_s=40)
    lease = await fleet.lease()
    assert await waits(fleet, "a") == (1, 60.0, "busy")
    fleet.clock.pass_(55)
    await fleet.announce(1)
    await fleet.store.renew(lease.seed, lease.user_id)
    assert isinstance(await ask(fleet, "a"), Queued)
    fleet.clock.pass_(5)
    await fleet.announce(1)
    missed = await ask(fleet, "a")
    assert isinstance(missed, Missed)
    assert (missed.intent, missed.waited_s, missed.text) == (True, 60.0, "it has waited 60 s, and the bound is 60 s")


async def test_only_so_many_wait_as_are_served_faster_than_storage(fleet: Fleet) -> None:
    await measured(fleet, load_s=40, hold_s=12)
    await fleet.lease()
    answers = [await ask(fleet, name, intent="") for name in "abcd"]
    assert [type(each) for each in answers] == [Queued, Queued, Queued, Missed]
    assert isinstance(answers[3], Missed)
    assert answers[3].text == "the expected wait is 48 s and a fork takes 6 s, and reading storage takes 40 s"


async def test_what_was_measured_outlives_the_seeds(fleet: Fleet) -> None:
    await measured(fleet, load_s=40)
    await fleet.store.withdraw("k", seed(1))
    assert await fleet.store.totals() == {}
    await ask(fleet, "loader")
    assert await waits(fleet, "a") == (1, 60.0, "loading")


async def test_an_intent_that_nobody_fulfils_is_no_measurement(fleet: Fleet) -> None:
    await fleet.store.intend("k", "gone", "", 10)
    fleet.clock.pass_(10)
    await fleet.store.intend("k", "back", "", 10)
    await fleet.store.intend("k", "back", "", 0)
    await fleet.announce(1)
    await fleet.lease()
    assert (await waits(fleet, "a"))[1] == 120.0


async def test_a_renewed_intent_counts_from_its_beginning(fleet: Fleet) -> None:
    await ask(fleet, "loader")
    for _ in range(4):
        fleet.clock.pass_(10)
        await fleet.store.intend("k", "loader", "", 30)
    await fleet.announce(1, intent="loader")
    await fleet.lease()
    assert (await waits(fleet, "a"))[1] == 60.0


async def test_an_operator_can_turn_waits_by_ticket_off(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_wait_s=50.0)
    await fleet.announce(1)
    await fleet.lease()
    assert (await waits(fleet, "a"))[1] == 50.0
    assert isinstance(await ask(fleet, "b", patient=False), Missed)


# --- after a restart -------------------------------------------------------------------------------------------------


async def test_after_a_restart_receivers_wait_for_seeds_that_are_held_back(fleet: Fleet) -> None:
    """Nobody knows their leases for one TTL: ten that start now would all read storage."""
    fleet.clock.pass_(10)
    await fleet.announce(1, slots=4, known_state="an earlier one")
    for number, name in enumerate("abcde", start=1):
        assert await waits(fleet, name) == (number, 120.0, "restarted")
    place = await ask(fleet, "a")
    assert isinstance(place, Queued)
    assert place.place is not None
    assert place.place.expected_s == pytest.approx(50.0)
    fleet.clock.pass_(49)
    await fleet.announce(1, slots=4, known_state="an earlier one")
    fleet.clock.pass_(1)
    await fleet.store.sweep()
    served = [await fetched(fleet, name) for name in "abcde"]
    assert [type(each) for each in served] == [Granted] * 4 + [Queued]


async def test_after_a_restart_nobody_waits_longer_than_storage_takes(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(recovery_hold_s=300.0)
    await fleet.announce(1, slots=4)
    missed = await ask(fleet, "a")
    assert isinstance(missed, Missed)
    assert missed.text == "the expected wait is 300 s, and the bound is 120 s"


async def test_a_new_seed_beside_those_that_are_held_back_serves_at_once(fleet: Fleet) -> None:
    await fleet.announce(1, known_state="an earlier one")
    await waits(fleet, "a")
    await fleet.announce(2)
    assert isinstance(await fetched(fleet, "a"), Granted)
