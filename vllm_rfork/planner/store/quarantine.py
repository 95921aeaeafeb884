"""Quarantine: a seed from which forks of several receivers fail in a row is not granted for a while."""

from __future__ import annotations

from vllm_rfork.planner.store.base import Event, Outcome
from vllm_rfork.planner.store.fleet_state import FleetState
from vllm_rfork.planner.store.records import Seed

#: Causes of failures that are not the seed's.
SEED_NOT_TO_BLAME = frozenset({"ConfigError", "ManifestMismatch", "NoSeedAvailable", "PlannerError"})


def record_outcome(fleet: FleetState, seed: Seed, receiver: str, outcome: Outcome) -> Event | None:
    """Count a fork's outcome, and quarantine ``seed`` if it is one failure too many; returns the event then.

    Receivers are counted, not failures: one that restarts again and again proves nothing about the seed. Each
    quarantine lasts twice as long as the one before. After one the count starts again, so that no receiver alone can
    prolong it.
    """
    if outcome.ok:
        seed.failed, seed.quarantines, seed.causes = (), 0, ""
        return None
    if outcome.cause in SEED_NOT_TO_BLAME or outcome.side == "receiver":
        return None
    rules = fleet.rules
    others = tuple(each for each in seed.failed if each[0] != receiver)
    seed.failed = (*others, (receiver, outcome.cause or "unknown"))
    if len(seed.failed) < rules.failures:
        return None
    backoff_s = min(rules.backoff_s * 2 ** min(seed.quarantines, 20), rules.max_backoff_s)
    seed.causes = ", ".join(f"{cause} ({who})" for who, cause in seed.failed)
    seed.failed, seed.quarantines = (), seed.quarantines + 1
    seed.quarantined_until = fleet.now + backoff_s
    fleet.due.set(("quarantine", seed.name, ""), max(seed.quarantined_until, seed.recovering_until))
    fleet.keys_to_recheck.add(seed.key)
    facts = {"seconds": backoff_s, "causes": seed.causes}
    return Event("seed_aside", seed.key, seed.name, f"{backoff_s:g}", facts)
