"""A lease lives as long as its read, and its loss is known to the reading thread."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.unit.interop_planners import OldPlanner, ProductionPlanner, TtlWithoutRenewal, serve
from tests.unit.virtual_time import VirtualTime, until
from vllm_rfork.clients import LeaseKeeper, Outcome, PlannerClient
from vllm_rfork.errors import PlannerError
from vllm_rfork.messages import Lease, SeedAddress

KEY = "k"
SEED = SeedAddress("10.0.0.1", 8080, 0)
TTL_S = 60.0


class FakePlanner(PlannerClient):
    """Answers renewals from ``outcomes``, the last one for ever."""

    def __init__(self, *outcomes: Outcome | str, renews: bool = True) -> None:
        super().__init__("http://unused")
        self.outcomes = list(outcomes)
        self.renews = renews
        self.renewed = 0

    async def renew(self, lease: Lease) -> Outcome:
        self.renewed += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, str):
            raise PlannerError(outcome)
        return outcome

    async def renews_leases(self) -> bool:
        return self.renews


async def started(planner: PlannerClient, virtual: VirtualTime, ttl_s: float | None = TTL_S) -> LeaseKeeper:
    keeper = LeaseKeeper(planner, Lease(SEED, "u1", ttl_s), clock=virtual.clock, sleep=virtual.sleep)
    await keeper.start()
    await virtual.settle()
    return keeper


async def test_it_renews_at_a_third_of_the_ttl_for_as_long_as_the_read_lasts() -> None:
    planner, virtual = FakePlanner(Outcome.DONE), VirtualTime()
    keeper = await started(planner, virtual)
    await virtual.advance(10 * TTL_S)
    assert planner.renewed == 30
    keeper.check()
    await keeper.stop()
    await virtual.advance(10 * TTL_S)
    assert planner.renewed == 30


async def test_a_lease_without_a_ttl_is_never_renewed_and_never_lost() -> None:
    planner, virtual = FakePlanner(Outcome.UNKNOWN), VirtualTime()
    keeper = await started(planner, virtual, ttl_s=None)
    await virtual.advance(1e6)
    keeper.check()
    await keeper.stop()
    assert planner.renewed == 0


async def test_a_lease_taken_back_is_lost_at_the_next_renewal() -> None:
    planner, virtual = FakePlanner(Outcome.DONE, Outcome.UNKNOWN), VirtualTime()
    keeper = await started(planner, virtual)
    await virtual.advance(TTL_S / 2)
    keeper.check()
    await virtual.advance(TTL_S / 2)
    for _ in range(2):
        with pytest.raises(PlannerError, match="ended the lease"):
            keeper.check()
    await keeper.stop()
    assert planner.renewed == 2


async def test_a_planner_that_never_knew_the_lease_took_it_back_too() -> None:
    planner, virtual = FakePlanner(Outcome.UNKNOWN, renews=True), VirtualTime()
    keeper = await started(planner, virtual)
    await virtual.advance(TTL_S / 2)
    with pytest.raises(PlannerError, match="ended the lease"):
        keeper.check()
    await keeper.stop()


async def test_a_planner_that_renewed_before_is_believed_without_asking() -> None:
    planner, virtual = FakePlanner(Outcome.DONE, Outcome.UNKNOWN, renews=False), VirtualTime()
    keeper = await started(planner, virtual)
    await virtual.advance(TTL_S)
    with pytest.raises(PlannerError, match="ended the lease"):
        keeper.check()
    await keeper.stop()


async def test_one_failed_renewal_is_made_up_for(caplog: pytest.LogCaptureFixture) -> None:
    planner, virtual = FakePlanner("hiccup", Outcome.DONE), VirtualTime()
    keeper = await started(planner, virtual)
    await virtual.advance(5 * TTL_S)
    keeper.check()
    await keeper.stop()
    assert len(caplog.records) == 1
    assert "hiccup" in caplog.text


async def test_an_outage_longer_than_the_ttl_loses_the_lease_and_names_the_cause(
    caplog: pytest.LogCaptureFixture,
) -> None:
    planner, virtual = FakePlanner(Outcome.DONE, "the planner's host is down"), VirtualTime()
    keeper = await started(planner, virtual)
    await virtual.advance(TTL_S * 1.2)  # renewed at a third of it
    keeper.check()
    await virtual.advance(TTL_S)
    with pytest.raises(PlannerError, match=r"expired.*host is down"):
        keeper.check()
    await keeper.stop()
    assert len(caplog.records) == 2  # the first failed renewal, the loss


async def test_the_clock_alone_tells_where_the_loop_stood_still() -> None:
    planner, virtual = FakePlanner(Outcome.DONE), VirtualTime()
    keeper = await started(planner, virtual)
    virtual.now_s += TTL_S + 1  # nothing in the loop ran meanwhile
    with pytest.raises(PlannerError, match="expired"):
        keeper.check()
    await keeper.stop()


async def test_the_term_counts_from_before_the_renewal_was_asked() -> None:
    virtual = VirtualTime()

    class Slow(FakePlanner):
        async def renew(self, lease: Lease) -> Outcome:
            virtual.now_s += 9.0
            return await super().renew(lease)

    keeper = await started(Slow(Outcome.DONE), virtual)
    await virtual.advance(TTL_S / 3)
    virtual.now_s = TTL_S / 3 + TTL_S - 1
    keeper.check()
    virtual.now_s = TTL_S / 3 + TTL_S + 1
    with pytest.raises(PlannerError, match="expired"):
        keeper.check()
    await keeper.stop()


async def test_a_planner_without_renewal_gives_exactly_its_one_ttl(caplog: pytest.LogCaptureFixture) -> None:
    planner, virtual = FakePlanner(Outcome.UNKNOWN, renews=False), VirtualTime()
    keeper = await started(planner, virtual)
    await virtual.advance(TTL_S - 1)
    keeper.check()
    await virtual.advance(2)
    with pytest.raises(PlannerError, match="no call to renew"):
        keeper.check()
    await keeper.stop()
    assert planner.renewed == 1
    assert len(caplog.records) == 1


async def test_check_works_from_the_reading_thread() -> None:
    planner, virtual = FakePlanner(Outcome.UNKNOWN), VirtualTime()
    keeper = await started(planner, virtual)
    errors: list[Exception] = []

    def read() -> None:
        try:
            keeper.check()
        except PlannerError as error:
            errors.append(error)

    for expected in (0, 1):
        thread = threading.Thread(target=read)
        thread.start()
        await asyncio.to_thread(thread.join, 10)
        assert len(errors) == expected
        await virtual.advance(TTL_S / 2)
    await keeper.stop()


async def test_stop_ends_a_renewal_under_way_and_may_be_repeated() -> None:
    virtual = VirtualTime()
    asked = asyncio.Event()

    class Hanging(FakePlanner):
        async def renew(self, lease: Lease) -> Outcome:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

    keeper = await started(Hanging(Outcome.DONE), virtual)
    await virtual.advance(TTL_S / 3)
    assert asked.is_set()
    await keeper.stop()
    await keeper.stop()
    assert virtual.asleep == 0


@pytest.mark.parametrize(
    ("planner", "lost_after_s"),
    [(OldPlanner(), None), (ProductionPlanner(), 20.0), (TtlWithoutRenewal(), 60.0)],
    ids=["old", "production, expired", "no renewal"],
)
async def test_with_real_planners(planner: OldPlanner, lost_after_s: float | None) -> None:
    virtual = VirtualTime()
    async with serve(planner.app()) as url:
        client = PlannerClient(url)
        await client.announce(KEY, SEED)
        lease = await client.acquire(KEY)
        keeper = LeaseKeeper(client, lease, clock=virtual.clock, sleep=virtual.sleep)
        await keeper.start()
        if isinstance(planner, ProductionPlanner):
            planner.expire_all()
        if lost_after_s is None:
            await virtual.advance(1e6)
            keeper.check()
        else:
            await until(lambda: virtual.asleep, "the keeper waits for its time")
            await virtual.advance(lost_after_s)

            def lost() -> bool:
                try:
                    keeper.check()
                except PlannerError:
                    return True
                return False

            await until(lost, "the keeper knows")
        await keeper.stop()
