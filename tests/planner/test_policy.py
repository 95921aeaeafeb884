"""Each policy's property, over plain candidates."""

from __future__ import annotations

import random

import pytest

from tests.planner.policy_by_search import Candidate, choose
from vllm_rfork.errors import ConfigError
from vllm_rfork.planner.policy import MAX_WEIGHT, POLICIES, TURNS, policy_named, score
from vllm_rfork.planner.store.indexes import Deadlines, RankedSet


def chosen(policy: str, candidates: list[Candidate], labels: dict[str, str] | None = None) -> str | None:
    found = choose(policy_named(policy), labels or {}, candidates)
    return found and found.address


def test_least_loaded_compares_leases_per_slot() -> None:
    one_of_two, two_of_eight = Candidate("a", leases=1, slots=2), Candidate("b", leases=2, slots=8, turn=9)
    assert chosen("least-loaded", [one_of_two, two_of_eight]) == "b"
    assert chosen("least-loaded", [Candidate("a", turn=5), Candidate("b", turn=3)]) == "b"


def test_nearest_prefers_host_then_rack_then_zone_and_takes_what_is_free() -> None:
    here = {"host": "h1", "rack": "r1", "zone": "z1"}
    same_host = Candidate("host", labels=here, leases=3, slots=4)
    same_rack = Candidate("rack", labels={**here, "host": "h2"}, leases=1, slots=4)
    same_zone = Candidate("zone", labels={"zone": "z1"})
    elsewhere = Candidate("far", labels={"host": "h9", "rack": "r9", "zone": "z9"})
    order = [same_host, same_rack, same_zone, elsewhere]
    for place, each in enumerate(order):
        assert chosen("nearest", order[place:][::-1], here) == each.address
    full = Candidate("host", labels=here, leases=4, slots=4)
    assert chosen("nearest", [full, elsewhere, same_zone], here) == "zone"
    assert chosen("nearest", [elsewhere, same_zone]) in ("far", "zone"), "a receiver without labels is not turned away"


def test_spread_prefers_the_quietest_network_card() -> None:
    idle_seed_on_a_busy_card = Candidate("a", leases=0, slots=4, nic_leases=3)
    busy_seed_on_a_quiet_card = Candidate("b", leases=1, slots=4, nic_leases=1, turn=9)
    assert chosen("spread-nics", [idle_seed_on_a_busy_card, busy_seed_on_a_quiet_card]) == "b"


def test_round_robin_goes_round_whatever_the_load() -> None:
    turns = {"a": 0, "b": 1, "c": 2}
    seen = []
    for turn in range(3, 9):
        candidates = [Candidate(name, leases=turn % 2, slots=9, turn=last) for name, last in turns.items()]
        seen.append(chosen("round-robin", candidates))
        turns[str(seen[-1])] = turn
    assert seen == list("abcabc")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_nobody_full_or_excluded_is_chosen(policy: str) -> None:
    full, free = Candidate("a", leases=2, slots=2), Candidate("b", leases=1, slots=2, turn=7)
    assert chosen(policy, [full, free]) == "b"
    assert choose(policy_named(policy), {}, [full, free], {"b"}) is None


@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: policy.name)
def test_scores_stay_exact_as_doubles(policy: object) -> None:
    for leases, turn in ((0, 1), (10**6, TURNS - 1), (MAX_WEIGHT, TURNS + 5)):
        value = score(policy, leases=leases, slots=1, nic_leases=leases, turn=turn)  # type: ignore[arg-type]
        assert int(float(value)) == value
        assert value < 2**53


def test_an_unknown_policy_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"cheapest.*least-loaded.*nearest"):
        policy_named("cheapest")


def test_a_ranked_set_is_a_sorted_set_and_stays_small() -> None:
    rng, ranked, plain = random.Random(0), RankedSet(), {}
    for _ in range(20_000):
        name = f"s{rng.randrange(20)}"
        if rng.random() < 0.3:
            ranked.discard(name)
            plain.pop(name, None)
        else:
            plain[name] = rng.randrange(1000)
            ranked.put(name, plain[name])
        exclude = {f"s{rng.randrange(20)}" for _ in range(rng.randrange(4))}
        rest = [(value, each) for each, value in plain.items() if each not in exclude]
        assert ranked.best(exclude) == (min(rest) if rest else None)
    assert len(ranked._heap) < 200


def test_deadlines_fall_due_in_order_once_and_when_last_said() -> None:
    rng, deadlines, plain, now = random.Random(0), Deadlines(), {}, 0.0
    for _ in range(5_000):
        name = ("kind", f"n{rng.randrange(30)}", "")
        if rng.random() < 0.1:
            deadlines.cancel(name)
            plain.pop(name, None)
        else:
            plain[name] = now + rng.randrange(1, 50)
            deadlines.set(name, plain[name])
        now += rng.random()
        due = sorted((at, each) for each, at in plain.items() if at <= now)
        assert list(deadlines.due(now)) == [each for _, each in due]
        for _, each in due:
            del plain[each]
        assert deadlines.next() == min(plain.values(), default=None)
    assert len(deadlines._heap) < 500
