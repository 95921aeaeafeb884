"""The choice of a seed: pure functions over plain values.

A policy is data: the label levels in which a nearby seed is preferred, and the weight that orders seeds within a
level. Stores keep their candidates ordered by :func:`score` inside the buckets of :func:`buckets`, so that a choice
costs the same with ten seeds and with fifty thousand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_rfork.errors import ConfigError

#: A score is ``weight * TURNS + turn``.
TURNS = 1 << 40
MAX_WEIGHT = (1 << 13) - 1
#: The bucket in which every seed sits.
EVERYWHERE = ""


@dataclass(frozen=True)
class Policy:
    """An order of seeds.

    ``levels`` are label names, nearest first: a seed that shares the receiver's value is preferred. ``weigh``
    is the weight within a level: ``load`` (leases per slot), ``nic`` (leases on all seeds behind the same network card)
    or ``turn`` (none). Ties go to the seed whose last turn is longest ago.
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


def policy_named(name: str) -> Policy:
    """Return the policy called ``name``. Raises :class:`ConfigError` if there is none."""
    try:
        return POLICIES[name]
    except KeyError:
        raise ConfigError("policy", f"unknown policy {name!r}", ", ".join(sorted(POLICIES))) from None


def buckets(policy: Policy, labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the buckets of one seed, or the buckets to search for one receiver, nearest first."""
    near = tuple(f"{level}={labels[level]}" for level in policy.levels if labels.get(level))
    return (*near, EVERYWHERE)


def score(policy: Policy, *, leases: int, slots: int, nic_leases: int, turn: int) -> int:
    """Return the rank within a bucket; the lowest is chosen."""
    if policy.weigh == "load":
        weight = leases * 1000 // max(slots, 1)
    elif policy.weigh == "nic":
        weight = nic_leases
    else:
        weight = 0
    return min(weight, MAX_WEIGHT) * TURNS + turn % TURNS


def nic_of(host: str, labels: Mapping[str, str]) -> str:
    """Return the network card of a seed on ``host``; without a label, all of the host counts as one."""
    return f"{labels.get('host') or host}/{labels.get('nic', '')}"
