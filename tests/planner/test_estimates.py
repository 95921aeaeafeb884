"""How long a receiver may wait: the rules as tables."""

from __future__ import annotations

import pytest

from vllm_rfork.planner.store.estimates import (
    BUSY,
    LOADING,
    RESTARTED,
    KeyTimes,
    Outlook,
    bound_s,
    expected_wait_s,
    judge,
)

NOTHING = KeyTimes()
#: A model that takes a minute from storage and whose forks hold a slot for ten seconds.
MEASURED = KeyTimes(hold_s=10, holds=5, fork_s=4, forks=5, load_s=60, loads=2)
BOUNDS = {"default_s": 120.0, "max_s": 600.0}


def test_means_are_exact_at_first_and_forget_later() -> None:
    times = KeyTimes()
    for sample in (2.0, 4.0, 6.0):
        times.add_load(sample)
    assert (times.load_s, times.loads) == (pytest.approx(4.0), 3)
    for _ in range(40):
        times.add_load(100.0)
    assert times.load_s == pytest.approx(100.0, rel=0.01)


def test_a_fork_is_as_long_as_its_receiver_says_and_no_longer_than_its_lease() -> None:
    times = KeyTimes()
    times.add_fork(10.0, 3.0)
    times.add_fork(10.0, 0.0)  # a legacy receiver reports nothing
    assert (times.hold_s, times.holds, times.fork_s, times.forks) == (10.0, 2, 3.0, 1)
    times.add_fork(10.0, 1e7)
    assert times.fork_s == pytest.approx(6.5)


@pytest.mark.parametrize(
    ("load_s", "bound"),
    [
        (None, 120.0),  # never measured: the default
        (1.0, 10.0),  # short waits are never too long
        (60.0, 90.0),  # half as long again for a loader that is late
        (300.0, 360.0),  # a minute at most
        (3600.0, 600.0),  # the operator's bound
    ],
)
def test_the_bound_is_what_storage_takes(load_s: float | None, bound: float) -> None:
    times = KeyTimes() if load_s is None else KeyTimes(load_s=load_s, loads=1)
    assert bound_s(times, 120.0, 600.0) == bound


@pytest.mark.parametrize(
    ("times", "outlook", "expected_s", "reason"),
    [
        # position over slots, times the hold
        (MEASURED, Outlook(position=1, seeds=1, slots=1), 10.0, BUSY),
        (MEASURED, Outlook(position=4, seeds=1, slots=4), 10.0, BUSY),
        (MEASURED, Outlook(position=9, seeds=2, slots=8), 11.25, BUSY),
        (MEASURED, Outlook(position=96, seeds=1, slots=4), 240.0, BUSY),
        # receivers become seeds: 4 served in the first ten seconds, 20 in the second, 100 in the third
        (MEASURED, Outlook(position=96, seeds=1, slots=4, grows=True), 20.0 + 72 / 100 * 10, BUSY),
        # quick forks: nobody carries leases before ten seconds are over
        (KeyTimes(hold_s=1, holds=1), Outlook(position=40, seeds=1, slots=4, grows=True), 10.0, BUSY),
        (KeyTimes(hold_s=1, holds=1), Outlook(position=64, seeds=1, slots=4, grows=True), 10.0 + 24 / 164, BUSY),
        # no fork was measured: a quarter of a load
        (KeyTimes(load_s=60, loads=1), Outlook(position=5, seeds=1, slots=4), 5 / 4 * 15, BUSY),
        # a pending loader: what is left of its time; where it is late, a quarter of it
        (MEASURED, Outlook(position=1, loading_s=0.0), 60.0, LOADING),
        (MEASURED, Outlook(position=1, loading_s=45.0), 15.0, LOADING),
        (MEASURED, Outlook(position=1, loading_s=58.0), 15.0, LOADING),
        (MEASURED, Outlook(position=9, loading_s=45.0, new_slots=4), 15.0 + 5 / 4 * 10, LOADING),
        # what is sooner counts
        (MEASURED, Outlook(position=1, seeds=1, slots=1, loading_s=0.0), 10.0, BUSY),
        (MEASURED, Outlook(position=8, seeds=1, slots=1, loading_s=55.0, new_slots=8), 15.0, LOADING),
        # after a restart: seconds until the seed may be granted
        (NOTHING, Outlook(position=1, withheld_slots=1, withheld_s=40.0), 40.0, RESTARTED),
        (MEASURED, Outlook(position=1, withheld_slots=4, withheld_s=40.0), 40.0, RESTARTED),
        (MEASURED, Outlook(position=6, withheld_slots=4, withheld_s=40.0), 45.0, RESTARTED),
        # nothing was measured
        (NOTHING, Outlook(position=3, seeds=1, slots=1), None, BUSY),
        (NOTHING, Outlook(position=3, loading_s=7.0), None, LOADING),
    ],
)
def test_the_expected_wait(times: KeyTimes, outlook: Outlook, expected_s: float | None, reason: str) -> None:
    found, found_reason = expected_wait_s(times, outlook)
    assert (found if found is None else pytest.approx(found), found_reason) == (expected_s, reason)


@pytest.mark.parametrize(
    ("times", "outlook", "waited_s", "waits", "text"),
    [
        # without history the default bound decides
        (NOTHING, Outlook(position=9, loading_s=0.0), 0.0, True, ""),
        (NOTHING, Outlook(position=9, loading_s=119.0), 119.0, True, ""),
        (NOTHING, Outlook(position=9, loading_s=120.0), 120.0, False, "it has waited 120 s, and the bound is 120 s"),
        (NOTHING, Outlook(position=1, withheld_slots=1, withheld_s=60.0), 0.0, True, ""),
        (
            NOTHING,
            Outlook(position=1, withheld_slots=1, withheld_s=300.0),
            0.0,
            False,
            "the expected wait is 300 s, and the bound is 120 s",
        ),
        # with history: wait and fork together against storage, which is slower for many readers than for one
        (MEASURED, Outlook(position=1, loading_s=0.0), 0.0, True, ""),
        (MEASURED, Outlook(position=7, seeds=1, slots=1), 0.0, True, ""),
        (
            MEASURED,
            Outlook(position=8, seeds=1, slots=1),
            0.0,
            False,
            "the expected wait is 80 s and a fork takes 4 s, and reading storage takes 60 s",
        ),
        (
            KeyTimes(load_s=20, loads=1),
            Outlook(position=1, withheld_slots=1, withheld_s=60.0),
            0.0,
            False,
            "the expected wait is 60 s, and reading storage takes 20 s",
        ),
        (MEASURED, Outlook(position=1, withheld_slots=1, withheld_s=50.0), 0.0, True, ""),
        # who began to wait together with the loader waits on where that is late, up to the bound
        (MEASURED, Outlook(position=1, loading_s=75.0), 75.0, True, ""),
        (MEASURED, Outlook(position=1, loading_s=90.0), 90.0, False, "it has waited 90 s, and the bound is 90 s"),
        # a short wait is never too long, whatever storage takes
        (KeyTimes(hold_s=4, holds=9, load_s=1, loads=1), Outlook(position=2, seeds=1, slots=1), 0.0, True, ""),
        (
            KeyTimes(hold_s=4, holds=9, load_s=1, loads=1),
            Outlook(position=2, seeds=1, slots=1),
            10.0,
            False,
            "it has waited 10 s, and the bound is 10 s",
        ),
    ],
)
def test_who_waits_and_who_loads(times: KeyTimes, outlook: Outlook, waited_s: float, waits: bool, text: str) -> None:
    verdict = judge(times, outlook, waited_s, **BOUNDS)
    assert (verdict.waits, verdict.text) == (waits, text)


def test_a_start_with_history_waits_no_longer_than_half_as_long_again_as_storage_takes() -> None:
    """Whatever is expected on the way: the bound is of the whole wait."""
    for waited_s in range(0, 400):
        hopeful = Outlook(position=1, seeds=9, slots=999, loading_s=float(waited_s))
        assert judge(MEASURED, hopeful, waited_s, **BOUNDS).waits == (waited_s < 90)


def test_an_expectation_of_any_queue_is_found_quickly() -> None:
    endless = Outlook(position=10**9, seeds=1, slots=1, grows=True)
    assert expected_wait_s(KeyTimes(hold_s=1e-6, holds=1), endless)[0] == pytest.approx(10.0, rel=0.02)
    assert judge(KeyTimes(hold_s=1e6, holds=1, load_s=9, loads=1), endless, 0.0, **BOUNDS).waits is False
