"""Entries of a planner's ``/debug/snapshot``, which a third-party planner may send in another form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from vllm_rfork.messages import DEBUG_SNAPSHOT


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
    if aside_s := entry.get("aside_s"):
        return f"quarantined for {duration(aside_s)}"
    if held_s := entry.get("held_s"):
        return f"held for {duration(held_s)}"
    return "serving"


def duration(seconds: float) -> str:
    """Seconds for people: ``90 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
