"""Entries of a planner's ``/debug/snapshot``, which a third-party planner may send in another form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from vllm_rfork.messages import DEBUG_SNAPSHOT

#: A century, and the most things that are counted: larger numbers are shown as missing.
_MAX_SECONDS, _MAX_COUNT = 100 * 366 * 86_400.0, 10**9


def lists_of(found: Mapping[str, Any], *names: str) -> dict[str, list[dict[str, Any]]]:
    """The lists called ``names`` in a snapshot.

    Raises:
        click.ClickException: one is missing, or is not a list of objects.
    """
    for name in names:
        entries = found.get(name)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise click.ClickException(
                f'cannot read {DEBUG_SNAPSHOT}: no usable "{name}" list (is this a third-party planner?)'
            )
    return {name: found[name] for name in names}


def seed_state(entry: Mapping[str, Any]) -> str:
    """The state of a seed: ``serving`` if the planner grants it."""
    if entry.get("absent"):
        return "absent"
    if entry.get("draining"):
        return "draining"
    if aside_s := seconds_of(entry, "aside_s"):
        return f"quarantined for {duration(aside_s)}"
    if held_s := seconds_of(entry, "held_s"):
        return f"held for {duration(held_s)}"
    return "serving"


def seconds_of(entry: Mapping[str, Any], name: str) -> float | None:
    """The seconds called ``name`` in an entry; None for a value of another form."""
    value = entry.get(name)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MAX_SECONDS
    return value if usable else None


def whole(value: object) -> int | None:
    """``value`` as a number of things; None for a value of another form."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT else None


def duration(seconds: float) -> str:
    """Seconds for people: ``90 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
