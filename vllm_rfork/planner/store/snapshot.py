"""The store's state as plain JSON data for people: snapshot and history.

Lease ids are shortened: a whole one is the right to release the lease.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm_rfork.messages import CacheResults
from vllm_rfork.messages.cache_results import HIT
from vllm_rfork.planner.store.history import PastFork

if TYPE_CHECKING:
    from vllm_rfork.planner.store.estimates import KeyTimes
    from vllm_rfork.planner.store.fleet_state import FleetState
    from vllm_rfork.planner.store.records import Intent, Lease, Seed, Waiter

_SHOWN = 4


def past_fork(entry: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return ``entry`` (the fields of :class:`PastFork`) for people, with its age and rate instead of its time."""
    rate = entry["nbytes"] / entry["duration_s"] / 1e9 if entry["nbytes"] and entry["duration_s"] else None
    shown = {name: value for name, value in entry.items() if name not in ("at", "worker")}
    shown["caches"] = caches_entry(entry["caches"])
    return shown | {"ago_s": round(now - entry["at"], 1), "gb_per_s": rate and round(rate, 3)}


def caches_entry(report: CacheResults | None) -> dict[str, Any] | None:
    """Return the report of a start as plain data, for people."""
    if report is None:
        return None
    hits = [kind for kind, result in report.kinds.items() if result == HIT]
    misses = {kind: reason for kind, reason in report.kinds.items() if reason != HIT}
    return {"hits": hits, "misses": misses, "saved_s": report.saved_s}


def lease_id(user_id: str) -> str:
    """Return enough of a lease id to distinguish two, and too little to release one."""
    return user_id.rpartition(".")[2][:_SHOWN] + "…"


def snapshot_head(fleet: FleetState) -> dict[str, Any]:
    """Return the fields of a snapshot about the whole fleet."""
    return {
        "state": fleet.state_id,
        "age_s": round(fleet.now - fleet.born_at, 1),
        "policy": fleet.rules.policy.name,
    }


def times_entry(times: KeyTimes) -> dict[str, Any]:
    """Return the measured times of one key, for people."""
    return {name: round(value, 3) for name, value in asdict(times).items()}


def snapshot_lists(
    fleet: FleetState, history: Sequence[PastFork], *, key: str | None, limit: int
) -> Iterator[tuple[str, list[Any], Callable[[Any, float], Any]]]:
    """Yield each list of a snapshot: its name, at most ``limit`` records, and the function that makes an entry."""
    shown = list(fleet.keys.values()) if key is None else [each for each in (fleet.keys.get(key),) if each]
    leases: Iterable[Lease] = fleet.leases.values()  # of seeds that are unknown as well
    if key is not None:
        leases = (lease for key_state in shown for lease in key_state.leases.values())
    found: dict[str, tuple[Iterable[Any], Callable[[Any, float], Any]]] = {
        "seeds": ((seed for key_state in shown for seed in key_state.seeds.values()), seed_entry),
        "leases": (leases, lease_entry),
        "waiting": (
            (pair for key_state in shown for pair in enumerate(key_state.waiters(), start=1)),
            lambda pair, now: waiter_entry(pair[0], pair[1], now),
        ),
        "intents": (
            (fleet.intent(key_state.key, each) for key_state in shown for each in key_state.intents),
            intent_entry,
        ),
        "times": (
            (pair for pair in fleet.times.items() if key is None or pair[0] == key),
            lambda pair, _: {"key": pair[0], **times_entry(pair[1])},
        ),
        "history": (
            (each for each in reversed(history) if key is None or each.key == key),
            lambda past, now: past_fork(vars(past), now),
        ),
    }
    yield "keys", shown[:limit], lambda key_state, now: (key_state.key, asdict(key_state.totals(now)))
    for name, (records, entry) in found.items():
        yield name, list(itertools.islice(records, limit)), entry


def seed_entry(seed: Seed, now: float) -> dict[str, Any]:
    """Return one seed, for people."""
    return {
        "key": seed.key,
        "seed": seed.name,
        "ip": seed.address.host,
        "port": seed.address.port,
        "rank": seed.address.rank,
        "fingerprint": seed.fingerprint,
        "epoch": seed.epoch,
        "parent": seed.parent,
        "labels": dict(seed.labels),
        "slots": seed.slots,
        "leases": seed.leases,
        "draining": seed.is_draining,
        "drained": seed.drained,
        "failures": len(seed.failed),
        "causes": seed.causes,
        "aside_s": max(0.0, round(seed.quarantined_until - now, 1)),
        "held_s": max(0.0, round(seed.recovering_until - now, 1)),
        "present": bool(seed.presence),
        "absent": seed.absent,
        "seen_s_ago": round(now - seed.seen_at, 1),
        "age_s": round(now - seed.first_seen, 1),
    }


def lease_entry(lease: Lease, now: float) -> dict[str, Any]:
    """Return one lease, for people."""
    return {
        "lease": lease_id(lease.user_id),
        "key": lease.key,
        "seed": lease.name,
        "receiver": lease.who,
        "address": lease.receiver,
        "host": lease.host,
        "pod": lease.pod,
        "held_s": round(now - lease.granted_at, 1),
        "expires_in_s": round(lease.expires_at - now, 1),
    }


def waiter_entry(place: int, waiter: Waiter, now: float) -> dict[str, Any]:
    """Return one waiting receiver and its place in its key's queue, for people."""
    return {
        "key": waiter.ask.key,
        "place": place,
        "receiver": waiter.ask.receiver,
        "host": waiter.ask.labels.get("host", ""),
        "pod": waiter.ask.labels.get("pod", ""),
        "fingerprint": waiter.ask.fingerprint,
        "intent": waiter.ask.intent,
        "waited_s": round(now - waiter.since, 1),
        "wait_s": round(waiter.bound_s, 1) or waiter.ask.wait_s,
    }


def intent_entry(intent: Intent, now: float) -> dict[str, Any]:
    """Return one pending loader, for people."""
    return {
        "key": intent.key,
        "intent": intent.intent,
        "fingerprint": intent.fingerprint,
        "address": intent.address,
        "host": intent.host,
        "pod": intent.pod,
        "since_s": round(now - intent.since, 1),
    }
