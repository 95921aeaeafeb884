"""Pauses between looks at a read: few looks, an end that is noticed soon, and never a long sleep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_rfork.engines.nixl.pace import LONGEST_S, MEASURED_NBYTES, SHORTEST_S, Pace

GIB = 1 << 30


def wait(pace: Pace, nbytes: int, takes_s: float) -> tuple[int, float]:
    """Wait for a read that takes ``takes_s``; the number of looks, and how late its end is noticed."""
    looks, now = 0, 0.0
    while now < takes_s:
        now += pace.pause_s(nbytes, now)
        looks += 1
    pace.learn(nbytes, now)
    return looks, now - takes_s


@pytest.mark.parametrize("bytes_per_s", [1e9, 25e9, 250e9])
def test_a_long_read_of_known_speed_takes_few_looks_and_ends_in_time(bytes_per_s: float) -> None:
    pace, takes_s = Pace(), 2 * GIB / bytes_per_s
    first, late_s = wait(pace, 2 * GIB, takes_s)
    assert late_s <= max(takes_s / 8, SHORTEST_S)
    looks, late_s = wait(pace, 2 * GIB, takes_s)
    assert looks < max(40.0, 2 * takes_s / LONGEST_S)
    assert first < 10 * looks
    assert late_s <= max(takes_s / 32, SHORTEST_S)


def test_a_faster_read_than_the_last_is_learned_again() -> None:
    pace = Pace()
    wait(pace, GIB, 0.1)
    for _ in range(8):
        _, late_s = wait(pace, GIB, 0.01)
    assert late_s < 0.001


def test_a_few_bytes_teach_nothing_about_many() -> None:
    """Their time is one round trip: as a speed it would predict minutes for a batch."""
    pace = Pace()
    pace.learn(MEASURED_NBYTES - 1, 10.0)
    assert wait(pace, GIB, 0.01)[1] <= 0.01 / 8


@given(st.floats(0, 1e6), st.integers(1, 1 << 40), st.none() | st.floats(1e-6, 1e6))
def test_a_pause_is_bounded(elapsed_s: float, nbytes: int, learned_s: float | None) -> None:
    """A closing engine and a deadline are noticed between two pauses."""
    pace = Pace()
    if learned_s is not None:
        pace.learn(GIB, learned_s)
    assert SHORTEST_S <= pace.pause_s(nbytes, elapsed_s) <= LONGEST_S
