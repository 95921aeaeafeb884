"""Comparison of one worker with the seeds of its key, by fingerprints and by the facts behind them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm_rfork.cli.seed_entries import seed_state, whole
from vllm_rfork.clients import SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.logs.quoting import counted
from vllm_rfork.manifest.facts import Difference, described, differences_to
from vllm_rfork.messages import BadMessage, SeedAddress, parse_seed_address

#: Seeds that are asked for their facts, those with different fingerprints first, and the number of calls at once.
MAX_READ, _AT_ONCE = 32, 8

#: ``equal``: without a fingerprint of the worker, all facts that the seed publishes are equal. ``unknown``: there is
#: nothing to compare. ``itself``: the seed is the worker.
Result = Literal["pairs", "differs", "equal", "unknown", "itself"]

#: The facts of one seed, or the reason why they cannot be read.
_Read = Mapping[str, str] | SeedError | BadMessage
#: Facts by fingerprint.
_Known = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Worker:
    """The worker that is compared.

    Attributes:
        fingerprint: empty if it is not known.
        facts: as seeds publish them; None if they are not known.
        source: where both are from.
        address, epoch: of its seed service, if it has one.
        planner: base URLs of the planner in its options, if they are known.
    """

    key: str
    fingerprint: str = ""
    facts: Mapping[str, str] | None = None
    source: str = ""
    address: SeedAddress | None = None
    epoch: str = ""
    planner: str = ""


@dataclass(frozen=True)
class Compared:
    """One seed of the planner's, compared with the worker.

    ``available`` means that the planner grants it, ``free`` that a slot is free now.
    """

    seed: str
    result: Result
    text: str
    differences: list[Difference] = field(default_factory=list)
    available: bool = False
    free: bool = False


@dataclass(frozen=True)
class Answer:
    """The conclusion: ``pairs`` is None if the worker's fingerprint is not known."""

    pairs: bool | None
    text: str


async def compare(worker: Worker, entries: Sequence[Mapping[str, Any]], seeds: SeedClient) -> list[Compared]:
    """Compare ``worker`` with the seeds in ``entries``, which are of its key and from a planner's snapshot."""
    read = {} if worker.facts is None else await _facts_of(_to_read(worker, entries), worker.key, seeds)
    known: dict[str, Mapping[str, str]] = {}
    for entry in entries:
        found = read.get(_place(_name(entry)))
        if isinstance(found, Mapping):
            known.setdefault(_fingerprint(entry), found)
    return [_compared(worker, entry, read, known) for entry in entries]


def _to_read(worker: Worker, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The seeds to ask: one of each other fingerprint, then a second one of each, and so on; each address once."""
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int, str]] = []
    for entry in entries:
        print_ = _fingerprint(entry)
        if print_ and print_ != worker.fingerprint and not _is_itself(worker, entry):
            ranked.append((seen[print_], len(ranked), _name(entry)))
            seen[print_] += 1
    names: dict[str, str] = {}
    for _, _, name in sorted(ranked):
        names.setdefault(_place(name), name)
    return list(names.values())[:MAX_READ]


async def _facts_of(names: Sequence[str], seed_key: str, seeds: SeedClient) -> dict[str, _Read]:
    """The facts of each seed, by its place."""
    places = asyncio.Semaphore(_AT_ONCE)

    async def facts_of(name: str) -> _Read:
        async with places:
            try:
                return await seeds.facts(parse_seed_address(name), seed_key)
            except (SeedError, BadMessage) as error:
                return error

    return dict(zip(map(_place, names), await asyncio.gather(*map(facts_of, names)), strict=True))


def _compared(worker: Worker, entry: Mapping[str, Any], read: Mapping[str, _Read], known: _Known) -> Compared:
    name, print_, state = _name(entry), _fingerprint(entry), seed_state(entry)
    if _is_itself(worker, entry):
        return Compared(name, "itself", state)
    if not print_:
        return Compared(name, "differs", "has no fingerprint: it is a legacy seed, whose weights cannot be verified")
    if worker.fingerprint == print_:
        leases = f"{entry.get('leases', '?')} of {entry.get('slots', '?')} leases"
        return Compared(name, "pairs", f"{state}, {leases}", available=state == "serving", free=_has_free_slot(entry))
    return _compared_by_facts(worker, entry, read, known)


def _compared_by_facts(worker: Worker, entry: Mapping[str, Any], read: Mapping[str, _Read], known: _Known) -> Compared:
    """Compare with a seed that has another fingerprint, or a worker that has none."""
    name, print_ = _name(entry), _fingerprint(entry)
    differs: Result = "differs" if worker.fingerprint else "unknown"
    if worker.facts is None:
        return Compared(name, differs, f"{seed_state(entry)}, fingerprint {print_[:12]}; facts were not compared")
    found = read.get(_place(name))
    theirs = found if isinstance(found, Mapping) else known.get(print_)
    if theirs is None:
        reason = f"not more than {MAX_READ} seeds are asked" if found is None else found
        return Compared(name, differs, f"facts not readable: {reason}")
    if differences := differences_to(worker.facts, theirs):
        return Compared(name, "differs", described([str(each) for each in differences]), differences)
    if worker.fingerprint:
        return Compared(name, "differs", "the facts that differ are not among those that seeds publish")
    return Compared(name, "equal", f"{seed_state(entry)}, every published fact is equal")


def answer(worker: Worker, compared: Sequence[Compared]) -> Answer:
    """The conclusion from the comparison with every seed of the key."""
    others = [each for each in compared if each.result != "itself"]
    if not others:
        return Answer(False, "it would load from storage (none: no other seed has this key)")
    if not worker.fingerprint:
        equal = [each.seed for each in others if each.result == "equal"]
        found = f"its facts are equal to those of {_one_of(equal)}" if equal else "no seed has equal facts"
        hint = "the worker's fingerprint is not known"
        return Answer(None, f"{found}, but {hint}" if worker.facts is not None else f"cannot tell: {hint}")
    pairs = [each for each in others if each.result == "pairs"]
    available = [each for each in pairs if each.available]
    if free := [each.seed for each in available if each.free]:
        return Answer(True, f"it would fork from {_one_of(free)}")
    if available:
        return Answer(True, f"it would wait for {_one_of([each.seed for each in available])}: every slot is in use")
    if pairs:
        return Answer(False, f"it would load from storage: {pairs[0].seed} pairs, but is {pairs[0].text}")
    return Answer(False, "it would load from storage (fingerprint)")


def _one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"one of {counted(len(names), 'seed')}, such as {names[0]}"


def _is_itself(worker: Worker, entry: Mapping[str, Any]) -> bool:
    """Return True for the worker's own seed; a worker has several names, but its epoch is unique."""
    if worker.epoch and entry.get("epoch") == worker.epoch:
        return True
    here = worker.address
    return here is not None and (entry.get("ip"), entry.get("port")) == (here.host, here.port)


def _has_free_slot(entry: Mapping[str, Any]) -> bool:
    leases, slots = whole(entry.get("leases")), whole(entry.get("slots"))
    return leases is None or slots is None or leases < slots


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("seed", ""))


def _place(name: str) -> str:
    """The address of the seed called ``name``, without its rank."""
    return name.rpartition(":")[0]


def _fingerprint(entry: Mapping[str, Any]) -> str:
    return str(entry.get("fingerprint", ""))
