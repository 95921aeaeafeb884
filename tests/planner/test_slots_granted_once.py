"""One slot is never granted twice: seeds that come back, planners that die, leases that somebody made up."""

from __future__ import annotations

import pytest

from tests.planner.conftest import Fleet, MakeFleet, seed, snapshot
from vllm_rfork import messages
from vllm_rfork.planner.store.base import Granted, Missed
from vllm_rfork.planner.store.errors import UnknownLease
from vllm_rfork.planner.store.lease_ids import LeaseIds, state_of
from vllm_rfork.planner.store.redis import RedisStore

# --- a stale seed ----------------------------------------------------------------------------------------------------


async def test_a_stale_seed_comes_back_to_the_leases_that_are_still_renewed(fleet: Fleet) -> None:
    await fleet.announce(1, slots=2)
    lease = await fleet.lease()
    fleet.clock.pass_(30)
    await fleet.store.renew(lease.seed, lease.user_id)
    fleet.clock.pass_(30)
    await fleet.store.sweep()
    assert await fleet.store.totals() == {}, "its heartbeats were lost for a minute"
    assert await fleet.ask() == Missed()
    await fleet.store.renew(lease.seed, lease.user_id)
    await fleet.announce(1, slots=2)
    assert isinstance(await fleet.ask(), Granted)
    assert await fleet.ask() == Missed(), "the slot that is being read from was granted a second time"
    await fleet.release(lease)
    assert isinstance(await fleet.ask(), Granted)


async def test_the_leases_of_a_stale_seed_end_after_their_ttl(fleet: Fleet) -> None:
    await fleet.announce(1)
    fleet.clock.pass_(59)
    lease = await fleet.lease()
    fleet.clock.pass_(1)
    await fleet.announce(2, key="other")
    fleet.clock.pass_(59)
    await fleet.store.sweep()
    with pytest.raises(UnknownLease):
        await fleet.store.renew(lease.seed, lease.user_id)
    await fleet.announce(1)
    await fleet.lease()


@pytest.mark.parametrize("changed", [{"epoch": "b"}, {"fingerprint": "b"}, {"key": "b"}])
async def test_other_bytes_at_a_stale_seeds_address_are_not_bound_by_its_leases(
    fleet: Fleet, changed: dict[str, str]
) -> None:
    bytes_ = {"key": "a", "epoch": "a", "fingerprint": "a"}
    await fleet.announce(1, **bytes_)
    lease = await fleet.lease("a")
    fleet.clock.pass_(50)
    await fleet.store.renew(lease.seed, lease.user_id)
    fleet.clock.pass_(10)
    await fleet.store.sweep()
    await fleet.announce(1, **{**bytes_, **changed})
    await fleet.lease(changed.get("key", "a"))
    with pytest.raises(UnknownLease):
        await fleet.store.renew(lease.seed, lease.user_id)


async def test_many_leases_of_stale_seeds_do_not_fill_the_memory(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_seeds=2)
    await fleet.announce(1, slots=3)
    leases = [await fleet.lease() for _ in range(3)]
    fleet.clock.pass_(50)
    for lease in leases:
        await fleet.store.renew(lease.seed, lease.user_id)
    fleet.clock.pass_(10)
    await fleet.store.sweep()
    with pytest.raises(UnknownLease):
        await fleet.store.renew(leases[0].seed, leases[0].user_id)
    assert seed(1) == leases[0].seed


# --- a planner that dies before its first answer ---------------------------------------------------------------------


async def test_a_seed_whose_first_announcement_had_no_answer_is_held_by_a_planner_without_memory(
    make_fleet: MakeFleet,
) -> None:
    before = await make_fleet()
    await before.announce(1)  # the answer never arrives: the seed learns no state id
    await before.lease()
    after = await make_fleet(like=before)
    await after.announce(1, known_state=messages.STATE_UNANSWERED)
    assert await after.ask() == Missed(), "the forgotten lease's slot was granted again"
    after.clock.pass_(59)
    await after.announce(1, known_state=messages.STATE_UNANSWERED)
    after.clock.pass_(1)
    await after.lease()


async def test_a_planner_that_did_not_die_does_not_hold_the_seed(fleet: Fleet) -> None:
    await fleet.announce(1)
    await fleet.announce(1, known_state=messages.STATE_UNANSWERED)
    await fleet.lease()
    fleet.clock.pass_(60)
    await fleet.announce(2, known_state=messages.STATE_UNANSWERED)
    await fleet.lease()


# --- invented leases -------------------------------------------------------------------------------------------------


def invented(state: str, number: int) -> str:
    return f"rf1.{state}.{number:024x}"


async def renewed(fleet: Fleet, user_id: str, name: int = 1) -> bool:
    try:
        await fleet.store.renew(seed(name), user_id)
    except UnknownLease:
        return False
    return True


async def leases(fleet: Fleet) -> int:
    return len((await snapshot(fleet.store))["leases"])


@pytest.mark.parametrize("known_state", ["", "0000aaaa"])
async def test_nobody_renews_a_lease_into_existence_that_the_seed_cannot_have_had(
    fleet: Fleet, known_state: str
) -> None:
    await fleet.announce(1, slots=3, known_state=known_state)
    assert not any([await renewed(fleet, invented("0000bbbb", number)) for number in range(5)])
    assert await leases(fleet) == 0


async def test_leases_of_the_seeds_own_earlier_state_take_no_more_than_its_slots(fleet: Fleet) -> None:
    await fleet.announce(1, slots=2, known_state="0000aaaa")
    assert [await renewed(fleet, invented("0000aaaa", number)) for number in range(5)] == [True] * 2 + [False] * 3
    assert await leases(fleet) == 2


async def test_a_lease_is_not_believed_before_its_seed_says_what_it_knew(fleet: Fleet) -> None:
    for number in range(4):
        assert await renewed(fleet, invented("0000aaaa", number))
        assert await renewed(fleet, invented("0000bbbb", number), name=2)
    assert await leases(fleet) == 0
    await fleet.announce(1, slots=2, known_state="0000aaaa")
    await fleet.announce(2, slots=2, known_state="0000cccc")
    assert await leases(fleet) == 2
    assert await renewed(fleet, invented("0000aaaa", 0))
    assert not await renewed(fleet, invented("0000aaaa", 3))
    assert not await renewed(fleet, invented("0000bbbb", 0), name=2)


async def test_a_lease_that_ends_before_its_seed_is_back_takes_no_slot(fleet: Fleet) -> None:
    kept, ended = invented("0000aaaa", 1), invented("0000aaaa", 2)
    assert await renewed(fleet, kept)
    assert await renewed(fleet, ended)
    with pytest.raises(UnknownLease):
        await fleet.store.release(seed(1), ended, None)
    await fleet.announce(1, slots=9, known_state="0000aaaa")
    assert await leases(fleet) == 1


async def test_what_is_noted_is_bounded(make_fleet: MakeFleet) -> None:
    fleet = await make_fleet(max_seeds=3, max_slots=2)
    noted = [
        await renewed(fleet, invented("0000aaaa", number), name=name) for name in range(10) for number in range(10)
    ]
    assert sum(noted) == 3 * 2


async def with_token(make_fleet: MakeFleet, *tokens: str, like: Fleet | None = None) -> Fleet:
    fleet = await make_fleet(like=like)
    fleet.store.lease_ids = LeaseIds(lambda: tokens)
    if isinstance(fleet.store, RedisStore):
        fleet.store.leadership.leading().memory.lease_ids = fleet.store.lease_ids
    return fleet


async def test_with_a_token_a_lease_proves_itself_even_if_the_seed_says_nothing(make_fleet: MakeFleet) -> None:
    before = await with_token(make_fleet, "token")
    await before.announce(1)
    lease = await before.lease()
    after = await with_token(make_fleet, "other", "token", like=before)  # rotated meanwhile
    assert await renewed(after, lease.user_id)
    assert await leases(after) == 1
    await after.announce(1)
    assert await after.ask() == Missed()


async def test_with_a_token_nothing_else_is_believed(make_fleet: MakeFleet) -> None:
    before = await with_token(make_fleet, "token")
    state = await before.announce(1)
    lease = await before.lease()
    after = await with_token(make_fleet, "other", like=before)
    await after.announce(1, slots=9, known_state=state)
    bare, _, mac = lease.user_id.rpartition(".")
    for user_id in (lease.user_id, bare, invented(state, 1), f"{invented(state, 1)}.{mac}"):
        assert not await renewed(after, user_id)
    assert await leases(after) == 0


def test_an_id_is_proven_by_its_token_and_for_its_seed_alone() -> None:
    user_id = LeaseIds(lambda: ["token"]).new("0123abcd", "10.0.0.1:1:0")
    assert state_of(user_id) == "0123abcd"
    assert LeaseIds(lambda: ["new", "token"]).is_proven(user_id, "10.0.0.1:1:0")
    assert not LeaseIds(lambda: ["token"]).is_proven(user_id, "10.0.0.1:1:1")
    assert not LeaseIds(lambda: ["tokem"]).is_proven(user_id, "10.0.0.1:1:0")
    assert not LeaseIds(lambda: []).is_proven(user_id, "10.0.0.1:1:0")
    changed = user_id.replace("0123abcd", "0123abce")
    assert not LeaseIds(lambda: ["token"]).is_proven(changed, "10.0.0.1:1:0")
    bare = LeaseIds().new("0123abcd", "10.0.0.1:1:0")
    assert (state_of(bare), bare.count(".")) == ("0123abcd", 2)
    for strange in ("", "rf1.", "rf2.0123abcd." + "0" * 24, bare + "0", bare + ".0", bare.upper(), bare + "\n"):
        assert state_of(strange) == ""
