"""Rules for how long a receiver waits for a seed, from the measured times of a key. No clock, no state, no I/O.

Waiting is right while it is expected to be faster than reading storage. The estimate is simple on purpose, and it is
repeated every few seconds of a wait, so that an error costs little. ``docs/adr/0009-waiting.md`` gives the reason for
each number.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_rfork.planner.store.journal import Record

#: The weight of a new sample in a mean, once there are as many samples as make that weight.
NEWEST = 0.2
#: If no fork of a key was measured, a fork is assumed to hold its slot for this share of a load from storage.
FORK_SHARE = 0.25
#: Waits up to this many seconds are always worth it: a start of vLLM takes much longer.
SHORT_S = 10.0
#: Waiting and forking may take this share longer than reading storage took: that was measured with few readers, and
#: receivers that are sent away together read together.
EVEN_SHARE = 0.25
#: A pending loader may be late by this share of its expected time, and by this many seconds at most.
LATE_SHARE, LATE_S = 0.5, 60.0
#: A pending loader that is late is expected to need this share of its expected time more.
OVERDUE_SHARE = 0.25
#: A receiver that has forked accepts leases itself after this many seconds at the earliest.
RIPENS_S = 10.0

#: What a receiver waits for. On the wire.
BUSY, LOADING, RESTARTED = "busy", "loading", "restarted"


@dataclass(slots=True)
class KeyTimes(Record):
    """The measured times of one key: means in seconds, and the number of samples of each. 0 samples: unknown.

    Attributes:
        hold_s, holds: from a lease's grant to its release: how long a fork occupies a slot.
        fork_s, forks: how long a fork took, as its receiver reported it.
        load_s, loads: from a pending loader's intent to its announcement as a seed.
    """

    hold_s: float = 0.0
    holds: int = 0
    fork_s: float = 0.0
    forks: int = 0
    load_s: float = 0.0
    loads: int = 0

    def add_fork(self, held_s: float, reported_s: float) -> None:
        """Add a fork that succeeded or reported nothing. Its lease lived ``held_s``; 0 reported: unknown.

        A fork cannot take longer than its lease, whatever is reported.
        """
        self.hold_s, self.holds = _mean(self.hold_s, self.holds, held_s)
        if reported_s > 0:
            self.fork_s, self.forks = _mean(self.fork_s, self.forks, min(reported_s, held_s))

    def add_load(self, load_s: float) -> None:
        """Add a load: a pending loader was announced ``load_s`` after its intent."""
        self.load_s, self.loads = _mean(self.load_s, self.loads, load_s)


def _mean(mean: float, count: int, sample: float) -> tuple[float, int]:
    """Return the mean with one more sample: exact at first, later exponentially weighted."""
    weight = max(NEWEST, 1 / (count + 1))
    return mean + (sample - mean) * weight, count + 1


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The situation of one receiver.

    Attributes:
        position: its place in the queue, from 1, among those that may use the same seeds.
        seeds, slots: suitable seeds, all busy now, and the leases that they accept at once.
        withheld_slots, withheld_s: slots that are granted only in ``withheld_s`` seconds, after a restart.
        loading_s: how long the oldest suitable pending loader has been loading; None if there is none.
        new_slots: the leases that a future seed accepts at once.
        grows: receivers of this key become seeds.
    """

    position: int
    seeds: int = 0
    slots: int = 0
    withheld_slots: int = 0
    withheld_s: float = 0.0
    loading_s: float | None = None
    new_slots: int = 1
    grows: bool = False


@dataclass(frozen=True)
class Verdict:
    """The decision whether a receiver waits on.

    Attributes:
        waits: the receiver should wait.
        bound_s: the longest total wait, in seconds from its start.
        expected_s: the expected wait from now on; None if unknown.
        reason: what it waits for: :data:`BUSY`, :data:`LOADING` or :data:`RESTARTED`.
        text: why it does not wait, for people; empty if it does.
    """

    waits: bool
    bound_s: float
    expected_s: float | None
    reason: str
    text: str = ""


def bound_s(times: KeyTimes, default_s: float, max_s: float) -> float:
    """Return the longest wait of one start in seconds: the time of a load, and a margin for a loader that is late.

    If no load was measured, it is ``default_s``.
    """
    if not times.loads:
        return min(default_s, max_s)
    late_s = min(times.load_s * LATE_SHARE, LATE_S)
    return min(max(times.load_s + late_s, SHORT_S), max_s)


def expected_wait_s(times: KeyTimes, outlook: Outlook) -> tuple[float | None, str]:
    """Return the expected wait from now on in seconds (None if nothing was measured) and what is waited for."""
    hold_s = _hold_s(times)
    ways: list[tuple[float, str]] = []
    unknown = ""

    def queue_s(position: int, slots: int, per_seed: float) -> float:
        return 0.0 if hold_s is None else _queue_s(position, slots, hold_s, per_seed if outlook.grows else 0.0)

    if outlook.slots and hold_s is None:
        unknown = BUSY
    elif outlook.slots:
        ways.append((queue_s(outlook.position, outlook.slots, outlook.slots / max(outlook.seeds, 1)), BUSY))
    if outlook.withheld_slots:
        # This many have a slot at once when the seeds may be granted again.
        behind = outlook.position - outlook.withheld_slots
        ways.append((outlook.withheld_s + queue_s(behind, outlook.withheld_slots, outlook.new_slots), RESTARTED))
    if outlook.loading_s is not None and not times.loads:
        unknown = unknown or LOADING
    elif outlook.loading_s is not None:
        left_s = max(times.load_s - outlook.loading_s, times.load_s * OVERDUE_SHARE)
        behind = outlook.position - outlook.new_slots
        ways.append((left_s + queue_s(behind, outlook.new_slots, outlook.new_slots), LOADING))
    return min(ways) if ways else (None, unknown or BUSY)


def _hold_s(times: KeyTimes) -> float | None:
    """Return how long a fork holds its slot; a guess if only loads were measured."""
    if times.holds:
        return times.hold_s
    return times.load_s * FORK_SHARE if times.loads else None


def _queue_s(position: int, slots: int, hold_s: float, per_seed: float) -> float:
    """Return when the receiver at ``position`` gets a slot: position over slots, times the hold.

    Each receiver that is served becomes a seed with ``per_seed`` slots (0: it does not), which count from the next
    round. So a long queue is expected to shrink faster and faster, as it does.
    """
    if position <= 0:
        return 0.0
    round_s = max(hold_s, RIPENS_S)
    waited_s, left, capacity = 0.0, float(position), float(slots)
    while per_seed and hold_s > 0 and (served := capacity * round_s / hold_s) < left:
        left -= served
        waited_s += round_s
        capacity += served * per_seed
    return waited_s + left / capacity * hold_s


def judge(times: KeyTimes, outlook: Outlook, waited_s: float, *, default_s: float, max_s: float) -> Verdict:
    """Decide whether a receiver that has waited ``waited_s`` seconds should wait on.

    Args:
        default_s: the bound of a wait for a key without a measured load.
        max_s: the bound of any wait.
    """
    bound = bound_s(times, default_s, max_s)
    expected_s, reason = expected_wait_s(times, outlook)
    if waited_s >= bound:
        text = f"it has waited {waited_s:.0f} s, and the bound is {bound:.0f} s"
        return Verdict(False, bound, expected_s, reason, text)
    if expected_s is None or expected_s <= SHORT_S:
        return Verdict(True, bound, expected_s, reason)
    if not times.loads:
        if expected_s <= bound - waited_s:
            return Verdict(True, bound, expected_s, reason)
        text = f"the expected wait is {expected_s:.0f} s, and the bound is {bound:.0f} s"
        return Verdict(False, bound, expected_s, reason, text)
    # The fork itself comes on top of the wait; storage is read at once.
    if expected_s + times.fork_s <= times.load_s * (1 + EVEN_SHARE):
        return Verdict(True, bound, expected_s, reason)
    fork = f" and a fork takes {times.fork_s:.0f} s" if times.forks else ""
    text = f"the expected wait is {expected_s:.0f} s{fork}, and reading storage takes {times.load_s:.0f} s"
    return Verdict(False, bound, expected_s, reason, text)
