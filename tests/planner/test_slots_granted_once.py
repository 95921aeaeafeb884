"""One slot is never granted twice: seeds that come back, planners that die, leases that somebody made up."""

from __future__ import annotations

import pytest

from tests.planner.conftest import Fleet, MakeFleet, seed
from vllm_rfork.planner.store import Granted, Missed, UnknownLease

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
