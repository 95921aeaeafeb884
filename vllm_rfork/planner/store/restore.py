"""Records of an earlier leader, added to the fleet of the next one with their full time."""

from __future__ import annotations

import dataclasses

from vllm_rfork.planner.store.base import Announcement
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.records import Drain, Intent, Lease, Seed

#: Fields of a seed that are not taken over: :meth:`FleetState.add_seed` computes them, or they ended with the
#: earlier leader's connections.
_COMPUTED = frozenset(
    {"slots", "nic", "buckets", "leases", "standing", "counted", "seen_at", "stale_at"}
    | {"presence", "absent", "absent_at", "given_up"}
)


def restore_seed(fleet: FleetState, kept: Seed) -> None:
    """Add a seed with its full time until it is stale. Raises :class:`LimitReached`."""
    announcement = Announcement(
        key=kept.key,
        seed=kept.address,
        fingerprint=kept.fingerprint,
        slots=kept.slots,
        labels=kept.labels,
        epoch=kept.epoch,
    )
    seed = fleet.add_seed(announcement, kept.name)
    for field in dataclasses.fields(Seed):
        if field.name not in _COMPUTED:
            setattr(seed, field.name, getattr(kept, field.name))
    fleet.numbers_begin_after(seed.turn)
    fleet.set_stale_at(seed, fleet.now + fleet.rules.stale_s)
    if seed.attends:
        fleet.due.set(("presence", seed.name, ""), fleet.now + fleet.rules.presence_takeover_s)
    if (until := max(seed.quarantined_until, seed.recovering_until)) > fleet.now:
        fleet.due.set(("quarantine", seed.name, ""), until)
    fleet.rank(seed)


def restore_lease(fleet: FleetState, lease: Lease) -> None:
    """Add a lease with its full TTL.

    A lease that was not fetched was never answered: only a receiver with its own ticket may ask for it again.
    """
    rules = fleet.rules
    lease.confirmed = not lease.unfetched_ticket  # renewals are not written
    claim_s = rules.confirmation_s if lease.ticket else rules.claim_s
    lease.expires_at = fleet.now + (claim_s if lease.unfetched_ticket else rules.lease_ttl_s)
    fleet.add_lease(lease)
    if lease.name in fleet.seeds:
        fleet.rank(fleet.seeds[lease.name])


def restore_drain(fleet: FleetState, name: str, drain: Drain) -> None:
    """Add a drain, and apply it to its seed, which a leader of a version without drains may have written meanwhile."""
    fleet.drains[name] = drain
    seed = fleet.seeds.get(name)
    if seed is not None and seed.epoch and (drain.key, drain.epoch) == (seed.key, seed.epoch):
        seed.drained = True
        fleet.rank(seed)


def restore_intent(fleet: FleetState, intent: Intent) -> None:
    """Add an intent with its full TTL."""
    fleet.add_intent(intent)
