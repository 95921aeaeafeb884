"""Two properties over random histories: the indexed choice is the policy's own, and both stores decide alike."""

from __future__ import annotations

import contextlib
import json
import random
from dataclasses import replace
from typing import Any

import pytest

from tests.planner.conftest import Clock, Fleet, MakeFleet, seed
from tests.planner.redis_server import RedisServer
from vllm_rfork.planner.memory_store import MemoryStore
from vllm_rfork.planner.policy import POLICIES, Candidate, choose, nic_of, policy_named
from vllm_rfork.planner.redis_store import RedisStore
from vllm_rfork.planner.store import Ask, Granted, Outcome, Queued, Rules, StoreError

#: name: how often
ACTIONS = {"seed": 2, "ask": 3, "wait": 2, "settle": 2, "release": 2, "pass": 2}
ACTIONS |= dict.fromkeys(["renew", "remove", "intend", "sweep"], 1)
LABELS = [
    {},
    {"host": "h1", "rack": "r1", "zone": "z1"},
    {"host": "h2", "rack": "r1", "zone": "z1"},
    {"host": "h3", "rack": "r2", "zone": "z1", "nic": "n0"},
    {"host": "h3", "rack": "r2", "zone": "z1", "nic": "n1"},
    {"zone": "z2"},
]


@pytest.mark.parametrize("policy_name", sorted(POLICIES))
async def test_the_seed_that_is_given_is_the_one_a_search_by_the_policy_finds(
    make_fleet: MakeFleet, policy_name: str
) -> None:
    rng = random.Random(policy_name)
    policy, fleet = policy_named(policy_name), await make_fleet(policy_name)
    shadow: dict[int, Candidate] = {}
    leases: list[Granted] = []
    by_name = {str(seed(number)): number for number in range(12)}
    for turn in range(1, 401):
        action = rng.random()
        if action < 0.2:
            number, labels, slots = rng.randrange(12), rng.choice(LABELS), rng.randint(1, 4)
            before = shadow.get(number, Candidate(str(seed(number)), turn=turn))
            shadow[number] = replace(before, labels=labels, slots=slots)
            await fleet.announce(number, labels=labels, slots=slots)
        elif action < 0.5 and leases:
            lease = leases.pop(rng.randrange(len(leases)))
            await fleet.release(lease)
            number = by_name[str(lease.seed)]
            shadow[number] = replace(shadow[number], leases=shadow[number].leases - 1)
        else:
            labels = rng.choice(LABELS)
            exclude = frozenset(rng.sample(sorted(by_name), rng.choice([0, 0, 1, 3])))
            loads: dict[str, int] = {}
            for number, each in shadow.items():
                nic = nic_of(seed(number).host, each.labels)
                loads[nic] = loads.get(nic, 0) + each.leases
            candidates = [
                replace(each, nic_leases=loads[nic_of(seed(number).host, each.labels)])
                for number, each in shadow.items()
            ]
            expected = choose(policy, labels, candidates, exclude)
            given = await fleet.ask(labels=labels, exclude=exclude)
            assert (str(given.seed) if isinstance(given, Granted) else None) == (expected and expected.address)
            if isinstance(given, Granted):
                leases.append(given)
                number = by_name[str(given.seed)]
                shadow[number] = replace(shadow[number], leases=shadow[number].leases + 1, turn=turn)
    assert leases


@pytest.mark.parametrize("number", range(12))
async def test_memory_and_redis_decide_alike(redis_server: RedisServer, number: int) -> None:
    rng = random.Random(number)
    policy = policy_named(rng.choice(sorted(POLICIES)))
    rules = Rules(policy=policy, failures=2, max_waiters=6, max_keys=3, max_intents=5, max_seeds=7, replica_s=1e6)
    clock = Clock()
    memory = Fleet(MemoryStore(rules, clock), clock)
    redis_ = Fleet(RedisStore(rules, redis_server.url, prefix=f"alike{number}", clock=clock), clock)
    pair = (memory, redis_)
    for each in pair:
        await each.store.open()
    #: leases of both stores side by side: the ids differ, everything else must not
    leases: list[tuple[Granted, Granted]] = []
    tickets: list[str] = []

    async def both(method: str, arguments: dict[str, Any], one_by_one: tuple[Any, Any] | None = None) -> Any:
        results = []
        for place, each in enumerate(pair):
            given = arguments | ({} if one_by_one is None else {"user_id": one_by_one[place].user_id})
            try:
                results.append(await getattr(each.store, method)(**given))
            except StoreError as error:
                results.append(type(error))
        if all(isinstance(each, Granted) for each in results):
            leases.append((results[0], results[1]))
            results = [replace(each, user_id="") for each in results]
        assert results[0] == results[1] or method == "announce", (method, arguments, results)
        return results[0]

    try:
        for step in range(500):
            key = rng.choice("abcd")
            print_ = rng.choice(["", "", "f", "g"])
            action = rng.choices(list(ACTIONS), list(ACTIONS.values()))[0]
            if action == "seed":
                number = rng.randrange(8)
                for each in pair:
                    with contextlib.suppress(StoreError):
                        await each.announce(
                            number,
                            key=key,
                            fingerprint=print_,
                            slots=1 + number % 3,
                            labels=LABELS[(step + number) % len(LABELS)] if step % 5 == 0 else {},
                            epoch=str(step % 2) if step % 7 == 0 else "",
                            intent="i1" if step % 3 == 0 else "",
                        )
            elif action in ("ask", "wait"):
                ask = Ask(
                    key=key,
                    receiver="r",
                    fingerprint=print_,
                    wait_s=rng.choice([5.0, 50.0]) if action == "wait" else 0.0,
                    ticket=f"t{step}",
                    exclude=frozenset(rng.sample([str(seed(each)) for each in range(8)], rng.choice([0, 0, 2]))),
                    labels=rng.choice(LABELS),
                    intent=rng.choice(["", "i1", "i2", "i3"]),
                )
                if isinstance(await both("acquire", {"ask": ask}), Queued):
                    tickets.append(ask.ticket)
            elif action == "settle" and tickets:
                ticket = tickets[rng.randrange(len(tickets))]
                await both("settle", {"ticket": ticket, "leave": rng.random() < 0.3})
            elif action == "release" and leases:
                lease = leases.pop(rng.randrange(len(leases)))
                outcome = rng.choice([None, Outcome(True, 5, 1.0), Outcome(False, cause="SeedError")])
                await both("release", {"seed": lease[0].seed, "outcome": outcome}, lease)
            elif action == "renew" and leases:
                lease = rng.choice(leases)
                await both("renew", {"seed": lease[0].seed}, lease)
            elif action == "remove":
                await both("withdraw", {"key": key, "seed": seed(rng.randrange(8))})
            elif action == "intend":
                intent, ttl_s = rng.choice(["i1", "i2", "i3", "i4"]), rng.choice([0.0, 30.0])
                await both("intend", {"key": key, "intent": intent, "fingerprint": print_, "ttl_s": ttl_s})
            elif action == "pass":
                clock.pass_(rng.choice([0.25, 3.0, 11.5]))
            elif action == "sweep":
                await both("sweep", {})
            if step % 10 == 0:
                assert await memory.store.totals() == await redis_.store.totals(), step
        assert sorted(memory.kinds()) == sorted(redis_.kinds())
        shown = [await each.store.snapshot() for each in pair]
        for name in ("seeds", "waiting", "intents"):
            rows = [sorted(json.dumps(row, sort_keys=True) for row in each[name]) for each in shown]
            assert rows[0] == rows[1]
        for key in (None, "a"):
            overviews = [_comparable(await each.store.overview(key=key)) for each in pair]
            assert overviews[0] == overviews[1]
    finally:
        for each in pair:
            await each.store.close()


def _comparable(overview: dict[str, Any]) -> dict[str, Any]:
    """Without what each store draws for itself; lists whose order is nobody's business are sorted."""
    for lease in overview["leases"]:
        del lease["lease"]
    for name in ("seeds", "leases", "waiting", "intents"):
        overview[name].sort(key=lambda row: json.dumps(row, sort_keys=True))
    return {name: value for name, value in overview.items() if name != "state"}
