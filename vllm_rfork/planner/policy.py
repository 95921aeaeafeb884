"""Which seed a receiver is given: pure functions over plain values, no state, no clock, no I/O.

A policy is data: the label levels in which a nearby seed is preferred, and what makes one seed heavier than
another within a level. Stores keep their candidates ordered by :func:`score` inside the buckets of
:func:`buckets`, so that a choice costs the same with ten seeds and with fifty thousand; :func:`choose` is the
same choice written as a plain search, and the contract tests hold every store against it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from vllm_rfork.errors import ConfigError

#: A score is ``weight * TURNS + turn`` and must stay exact as a double.
TURNS = 1 << 40
MAX_WEIGHT = (1 << 13) - 1
#: The bucket in which every seed sits.
EVERYWHERE = ""


@dataclass(frozen=True)
class Policy:
    """How seeds are ordered.

    ``levels`` are label names, nearest first: a seed that shares the receiver's value is preferred. ``weigh``
    says what counts within a level: ``load`` (leases per slot), ``nic`` (leases on all seeds behind the same
    network card) or ``turn`` (nothing). Ties always go to the seed whose last turn is longest ago.
    """

    name: str
    weigh: str
    levels: tuple[str, ...] = ()


POLICIES: Mapping[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("least-loaded", "load"),
        Policy("nearest", "load", ("host", "rack", "zone")),
        Policy("spread-nics", "nic"),
        Policy("round-robin", "turn"),
    )
}


@dataclass(frozen=True)
class Candidate:
    """One seed as a policy sees it.

    ``turn`` grows with every grant (and starts at the announcement's), ``nic_leases`` counts the leases of all
    seeds behind the same network card, this one's included.
    """

    address: str
    leases: int = 0
    slots: int = 1
    turn: int = 0
    nic_leases: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


def policy_named(name: str) -> Policy:
    """The policy called ``name``.

    Raises:
        ConfigError: there is none.
    """
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError("policy", f"unknown policy {name!r}", ", ".join(sorted(POLICIES))) from None


def buckets(policy: Policy, labels: Mapping[str, str]) -> tuple[str, ...]:
    """The buckets of one seed or the buckets to search for one receiver, nearest first."""
    near = tuple(f"{level}={labels[level]}" for level in policy.levels if labels.get(level))
    return (*near, EVERYWHERE)


def score(policy: Policy, *, leases: int, slots: int, nic_leases: int, turn: int) -> int:
    """The order within a bucket; the lowest is chosen. Exact in a double."""
    if policy.weigh == "load":
        weight = leases * 1000 // max(slots, 1)
    elif policy.weigh == "nic":
        weight = nic_leases
    else:
        weight = 0
    return min(weight, MAX_WEIGHT) * TURNS + turn % TURNS


def nic_of(host: str, labels: Mapping[str, str]) -> str:
    """The network card that a seed on ``host`` sends through; the whole host where no label says."""
    return f"{labels.get('host') or host}/{labels.get('nic', '')}"


def choose(
    policy: Policy,
    receiver_labels: Mapping[str, str],
    candidates: Iterable[Candidate],
    exclude: Container[str] = frozenset(),
) -> Candidate | None:
    """The candidate a receiver is given, or None where every one is full or excluded.

    Linear in the number of candidates: the definition that indexed stores must agree with.
    """
    free = [each for each in candidates if each.leases < each.slots and each.address not in exclude]
    for bucket in buckets(policy, receiver_labels):
        here = [each for each in free if bucket in buckets(policy, each.labels)]
        if here:
            return min(here, key=lambda each: _order(policy, each))
    return None


def _order(policy: Policy, each: Candidate) -> tuple[int, str]:
    weight = score(policy, leases=each.leases, slots=each.slots, nic_leases=each.nic_leases, turn=each.turn)
    return weight, each.address
