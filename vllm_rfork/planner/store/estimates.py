"""How long a receiver may wait for a seed: rules over the measured times of a key. No clock, no state, no I/O.

Waiting is right while it is expected to be faster than reading storage. The expectation is simple on purpose, and it
is made again every few seconds of a wait, so that an error of it costs little. ``docs/adr/0009-waiting.md`` has the
reasons for each number.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_rfork.planner.store.records import Record

#: The weight of a new sample in a mean, once there are as many samples as make that weight.
NEWEST = 0.2
#: Where no fork of a key was measured: the share of a load from storage for which a fork is taken to hold its slot.
FORK_SHARE = 0.25
#: Waits up to this many seconds are never too long: against a start of vLLM they are short.
SHORT_S = 10.0
#: Waiting and forking may take this share longer than reading storage took: that was measured with few readers, and
#: those who are sent away together read together.
EVEN_SHARE = 0.25
#: A pending loader may be late by this share of its expected time, and by so many seconds at most.
LATE_SHARE, LATE_S = 0.5, 60.0
#: A pending loader that is late is expected to need this share of its expected time still.
OVERDUE_SHARE = 0.25
#: A receiver that has forked carries leases itself after so many seconds at the earliest.
RIPENS_S = 10.0

#: What a receiver waits for. On the wire.
BUSY, LOADING, RESTARTED = "busy", "loading", "restarted"


@dataclass(slots=True)
class KeyTimes(Record):
    """The measured times of one key: means in seconds, and how many samples each is made of. 0 samples: unknown.

    A store may keep them.

    Attributes:
        hold_s, holds: from a lease's grant to its release: how long a fork occupies a slot.
        fork_s, forks: how long a fork took, in the receiver's own words.
        load_s, loads: from a pending loader's intent to its announcement as a seed.
    """

    hold_s: float = 0.0
    holds: int = 0
    fork_s: float = 0.0
    forks: int = 0
    load_s: float = 0.0
    loads: int = 0

    def add_fork(self, held_s: float, reported_s: float) -> None:
        """A fork that ended well, or of which nothing was said: its lease lived ``held_s``; 0 reported: not said.

        A fork cannot take longer than its lease, whatever is reported.
        """
        self.hold_s, self.holds = _mean(self.hold_s, self.holds, held_s)
        if reported_s > 0:
            self.fork_s, self.forks = _mean(self.fork_s, self.forks, min(reported_s, held_s))

    def add_load(self, load_s: float) -> None:
        """A pending loader announced itself ``load_s`` after its intent."""
        self.load_s, self.loads = _mean(self.load_s, self.loads, load_s)


def _mean(mean: float, count: int, sample: float) -> tuple[float, int]:
    """The mean with one more sample: exact at first, later one that forgets."""
    weight = max(NEWEST, 1 / (count + 1))
    return mean + (sample - mean) * weight, count + 1


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What one receiver has in prospect.

    Attributes:
        position: its place in the queue, from 1, among those who may take the same seeds.
        seeds, slots: the seeds that suit it, all of them busy now, and the leases that they carry at once.
        held_slots, held_s: the slots that are not granted before ``held_s`` seconds from now, after a restart.
        loading_s: how long the oldest pending loader that suits has been loading; None: there is none.
        new_slots: the leases that a seed carries which is still to come.
        grows: receivers of this key become seeds.
    """

    position: int
    seeds: int = 0
    slots: int = 0
    held_slots: int = 0
    held_s: float = 0.0
    loading_s: float | None = None
    new_slots: int = 1
    grows: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether to wait on, and what may be said of it.

    Attributes:
        waits: the receiver is to wait.
        bound_s: the longest wait in all, in seconds from its start.
        expected_s: the expected wait from now on; None: not known.
        reason: what it waits for: :data:`BUSY`, :data:`LOADING` or :data:`RESTARTED`.
        text: why it does not wait, for people; empty where it does.
    """

    waits: bool
    bound_s: float
    expected_s: float | None
    reason: str
    text: str = ""


def bound_s(times: KeyTimes, default_s: float, max_s: float) -> float:
    """The longest wait of one start: what reading storage takes, and time for a loader that is late; in seconds.

    Where no load was measured: ``default_s``.
    """
    if not times.loads:
        return min(default_s, max_s)
    late_s = min(times.load_s * LATE_SHARE, LATE_S)
    return min(max(times.load_s + late_s, SHORT_S), max_s)


def expected_wait_s(times: KeyTimes, outlook: Outlook) -> tuple[float | None, str]:
    """The expected wait from now on in seconds, None where nothing was measured, and what is waited for."""
    hold_s = _hold_s(times)
    ways: list[tuple[float, str]] = []
    unknown = ""

    def queue_s(position: int, slots: int, per_seed: float) -> float:
        return 0.0 if hold_s is None else _queue_s(position, slots, hold_s, per_seed if outlook.grows else 0.0)

    if outlook.slots and hold_s is None:
        unknown = BUSY
    elif outlook.slots:
        ways.append((queue_s(outlook.position, outlook.slots, outlook.slots / max(outlook.seeds, 1)), BUSY))
    if outlook.held_slots:
        # The first so many have a slot at once when the seeds may be granted again.
        behind = outlook.position - outlook.held_slots
        ways.append((outlook.held_s + queue_s(behind, outlook.held_slots, outlook.new_slots), RESTARTED))
    if outlook.loading_s is not None and not times.loads:
        unknown = unknown or LOADING
    elif outlook.loading_s is not None:
        left_s = max(times.load_s - outlook.loading_s, times.load_s * OVERDUE_SHARE)
        behind = outlook.position - outlook.new_slots
        ways.append((left_s + queue_s(behind, outlook.new_slots, outlook.new_slots), LOADING))
    return min(ways) if ways else (None, unknown or BUSY)


def _hold_s(times: KeyTimes) -> float | None:
    """How long a fork holds its slot; a guess where only loads were measured."""
    if times.holds:
        return times.hold_s
    return times.load_s * FORK_SHARE if times.loads else None


def _queue_s(position: int, slots: int, hold_s: float, per_seed: float) -> float:
    """When the receiver at ``position`` has a slot: position over slots, times the hold.

    Each of those who are served becomes a seed with ``per_seed`` slots; they count from the round after, so that a
    long queue is expected to shrink faster and faster, as it does. 0: they do not.
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
    """Whether a receiver that has waited ``waited_s`` seconds is to wait on.

    Args:
        default_s: the bound of a wait for a key of which no load was measured.
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
