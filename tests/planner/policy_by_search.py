"""The choice of a seed as a plain search: the definition with which every store must agree."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from vllm_rfork.planner.policy import Policy, buckets, score


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
