"""Two properties over random histories: the choice is the policy's own, and Redis has what the leader remembers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from dataclasses import replace
from typing import Any

import pytest

from tests.planner.conftest import Clock, Fleet, MakeFleet, seed, snapshot
from tests.planner.policy_by_search import Candidate, choose
from tests.planner.redis_server import RedisServer
from vllm_rfork.planner.policy import POLICIES, nic_of, policy_named
from vllm_rfork.planner.store.base import Announcement, Granted, Outcome, Queued, Rules
from vllm_rfork.planner.store.errors import StoreError
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.key_state import ANY
from vllm_rfork.planner.store.memory import MemoryStore
from vllm_rfork.planner.store.redis import RedisStore

#: name: how often
ACTIONS = {"seed": 2, "ask": 3, "wait": 2, "ticket": 3, "settle": 2, "park": 2, "release": 2, "pass": 2}
ACTIONS |= dict.fromkeys(["renew", "remove", "intend", "sweep", "attend"], 1)
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


@pytest.mark.parametrize("number", range(8))
async def test_what_is_written_is_what_the_leader_remembers(redis_server: RedisServer, number: int) -> None:
    """After any history, and any number of leaders, the next one finds the records of the one before."""
    rng = random.Random(number)
    rules = Rules(
        policy=policy_named(rng.choice(sorted(POLICIES))),
        failures=2,
        max_waiters=6,
        max_keys=3,
        max_intents=5,
        max_seeds=7,
        max_history=9,
    )
    clock = Clock()
    stores: list[RedisStore] = []

    async def successor() -> Fleet:
        store = RedisStore(rules, redis_server.url, prefix=f"written{number}", leader_ttl_s=0.06, clock=clock)
        if stores:
            await _kill(stores[-1])
        stores.append(store)
        await store.open()
        while not store.leads:
            await asyncio.sleep(0.01)
        return Fleet(store, clock)

    fleet = await successor()
    leases: list[Granted] = []
    tickets: list[str] = []
    try:
        for step in range(400):
            with contextlib.suppress(StoreError):
                await _act(fleet, rng, step, clock, leases, tickets)
            if step % 80 == 79:
                await fleet.store.sweep()
                await stores[-1].leadership.look()  # a sign of life, which also writes the clock
                before = await snapshot(fleet.store)
                fleet = await successor()
                assert _records(await snapshot(fleet.store)) == _records(before)
                tickets.clear()
        assert leases
    finally:
        for each in stores:
            await each.close()


@pytest.mark.parametrize("number", range(6))
async def test_whatever_happens_every_index_agrees_with_the_records(number: int) -> None:
    """A ticket has one lease at most, and what is counted is what is there."""
    rng, clock = random.Random(number), Clock()
    fleet = Fleet(MemoryStore(Rules(policy=policy_named("least-loaded"), max_waiters=8), clock), clock)
    leases: list[Granted] = []
    tickets: list[str] = []
    for step in range(600):
        with contextlib.suppress(StoreError):
            await _act(fleet, rng, step, clock, leases, tickets)
        _check(fleet.store.begin())  # type: ignore[attr-defined]
    assert leases


def _check(fleet: FleetState) -> None:
    asked = [each for each in fleet.leases.values() if each.ticket]
    assert fleet.lease_of == {(each.ticket, each.key): each.user_id for each in asked}
    assert len(fleet.lease_of) == len(asked)
    for key_state in fleet.keys.values():
        for print_ in (ANY, "", "f", "g"):
            suit = [each for each in key_state.seeds.values() if print_ is ANY or each.fingerprint == print_]
            serving = [each for each in suit if each.is_serving(fleet.now) and not each.absent]
            withheld = [each for each in serving if fleet.now < each.recovering_until]
            ready = [each for each in serving if each not in withheld]
            assert key_state.ready[print_] == sum(each.slots for each in ready)
            assert key_state.ready_seeds[print_] == len(ready)
            assert key_state.withheld[print_] == sum(each.slots for each in withheld)
        assert key_state.intent_since.keys() == key_state.intents.keys()
        numbers = {name: [each.number for each in queue.values()] for name, queue in key_state.queues.items()}
        assert numbers == key_state.numbers
        for place, waiter in enumerate(key_state.waiters(), start=1):
            assert 1 <= key_state.position(waiter.ask, waiter.number) <= place


async def _act(
    fleet: Fleet, rng: random.Random, step: int, clock: Clock, leases: list[Granted], tickets: list[str]
) -> None:
    """One event in the life of a fleet."""
    key, print_ = rng.choice("abcd"), rng.choice(["", "", "f", "g"])
    action = rng.choices(list(ACTIONS), list(ACTIONS.values()))[0]
    found: object = None
    if action == "seed":
        await fleet.announce(
            rng.randrange(8),
            key=key,
            fingerprint=print_,
            slots=rng.randint(1, 3),
            labels=rng.choice(LABELS),
            epoch=rng.choice(["", "0", "1"]),
            intent=rng.choice(["", "", "i1"]),
        )
    elif action == "attend":
        attending = Announcement(key=key, seed=seed(rng.randrange(8)), fingerprint=print_)
        number = await fleet.store.attend(attending, held=rng.random() < 0.8)
        if rng.random() < 0.5:
            await fleet.store.leave(attending.seed, number, answered=rng.random() < 0.5)
    elif action in ("ask", "wait"):
        found = await fleet.ask(
            key=key,
            fingerprint=print_,
            wait_s=rng.choice([5.0, 50.0]) if action == "wait" else 0.0,
            exclude=frozenset(rng.sample([str(seed(each)) for each in range(8)], rng.choice([0, 0, 2]))),
            labels=rng.choice(LABELS),
            intent=rng.choice(["", "i1", "i2", "i3"]),
        )
    elif action == "ticket":
        wait_s = rng.choice([None, None, 0.0, 20.0])
        found = await fleet.ask(
            key=key,
            fingerprint=print_,
            wait_s=wait_s or 0.0,
            patient=wait_s is None,
            keeps=True,
            ticket=rng.choice(["t1", "t2", "t3", "t4"]),
            exclude=frozenset(rng.sample([str(seed(each)) for each in range(8)], rng.choice([0, 0, 2]))),
            intent=rng.choice(["", "i1", "i2", "i3"]),
        )
    elif action == "park":
        found = await fleet.store.park(rng.choice(["t1", "t2", "t3", "t4"]), hung_up=rng.random() < 0.5)
    elif action == "settle" and tickets:
        found = await fleet.store.settle(rng.choice(tickets), leave=rng.random() < 0.3)
    elif action == "release" and leases:
        outcome = rng.choice([None, Outcome(True, 5, 1.0), Outcome(False, cause="SeedError")])
        await fleet.release(leases.pop(rng.randrange(len(leases))), outcome)
    elif action == "renew" and leases:
        lease = rng.choice(leases)
        await fleet.store.renew(lease.seed, lease.user_id)
    elif action == "remove":
        await fleet.store.withdraw(key, seed(rng.randrange(8)))
    elif action == "intend":
        await fleet.store.intend(key, rng.choice(["i1", "i2", "i3", "i4"]), print_, rng.choice([0.0, 30.0]))
    elif action == "pass":
        clock.pass_(rng.choice([0.25, 3.0, 11.5]))
    elif action == "sweep":
        await fleet.store.sweep()
    if isinstance(found, Granted):
        leases.append(found)
    elif isinstance(found, Queued):
        tickets.append(found.ticket)


async def _kill(store: RedisStore) -> None:
    await store.leadership.stop_looking()


def _records(snapshot: dict[str, Any]) -> dict[str, Any]:
    """What must survive: all but the lines, and the times that begin anew."""
    for each in snapshot["seeds"]:
        del each["seen_s_ago"], each["present"], each["absent"]  # connections end with the leader that held them
    for each in snapshot["leases"]:
        del each["expires_in_s"]
    kept = {name: snapshot[name] for name in ("state", "age_s", "policy", "history")}
    for name in ("seeds", "leases", "intents", "times"):
        kept[name] = sorted(json.dumps(row, sort_keys=True) for row in snapshot[name])
    return kept
