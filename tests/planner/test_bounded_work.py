"""The work of one decision is bounded, whatever receivers ask for. Counted, so that no machine is too slow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.planner.conftest import Clock, Fleet, seed
from vllm_rfork.planner.memory_store import MemoryStore
from vllm_rfork.planner.policy import policy_named
from vllm_rfork.planner.store import Granted, Queued, Rules, StillLeased

EXCLUDED = 256  # as many as a header may name


class Exclusions(frozenset[str]):
    """Seeds that a receiver excludes; counts how often somebody looks."""

    looked = 0

    def __contains__(self, name: object) -> bool:
        Exclusions.looked += 1
        return super().__contains__(name)


@contextlib.contextmanager
def at_most(looks: int) -> Iterator[None]:
    Exclusions.looked = 0
    yield
    assert Exclusions.looked <= looks


@pytest.fixture
def fleet() -> Fleet:
    clock = Clock()
    return Fleet(MemoryStore(Rules(policy=policy_named("least-loaded")), clock), clock)


async def test_a_seed_with_many_slots_passes_through_the_line_once(fleet: Fleet) -> None:
    for _ in range(500):
        await fleet.ask(wait_s=60, exclude=Exclusions({str(seed(1))}))
    suited = [await fleet.ask(wait_s=60, exclude=Exclusions({str(seed(2))})) for _ in range(70)]
    with at_most(600):
        await fleet.announce(1, slots=64)
    with at_most(600):
        await fleet.announce(1, slots=64)
    assert len(fleet.settled) == 64
    assert fleet.settled == [each.ticket for each in suited[:64] if isinstance(each, Queued)]


async def test_a_seed_that_goes_does_not_make_every_exclusion_of_every_waiting_receiver_be_looked_at(
    fleet: Fleet,
) -> None:
    everybody = Exclusions(str(seed(number)) for number in range(EXCLUDED))
    for number in range(EXCLUDED):
        await fleet.announce(number)
    assert isinstance(await fleet.ask(), Granted)
    await fleet.store.intend("k", "loader", "", 600)
    waiting = 400
    for number in range(waiting):
        assert isinstance(await fleet.ask(wait_s=60, intent=f"i{number}", exclude=everybody), Queued)
    with at_most(3 * waiting):
        for number in range(EXCLUDED):
            with contextlib.suppress(StillLeased):
                await fleet.store.withdraw("k", seed(number))
                break
    with at_most(3 * waiting):
        await fleet.store.intend("k", "loader", "", 0)
    assert len(fleet.settled) == 1, "one of them loads, the others wait for it"
