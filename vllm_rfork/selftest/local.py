"""The self-test on one machine: seed and receiver are two of its processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_rfork.selftest.attempts import in_order, on_this_machine
from vllm_rfork.selftest.report import Report, report
from vllm_rfork.selftest.roles import Trial


def run(trial: Trial, engines: Sequence[str], *, setting: str, every: bool = False) -> Report:
    """Fork between two processes; returns within about ``trial.timeout_s`` seconds whatever the engines do.

    Args:
        trial: its engine is replaced by each of ``engines`` in turn, until bytes have arrived.
        setting: the engines as the user named them, for the title.
        every: try them all.
    """
    trials = [replace(trial, engine=engine) for engine in engines]
    attempts = in_order(trials, trial.timeout_s, on_this_machine, every=every)
    return report(f"selftest {setting}: {trial.seed_device} -> {trial.device}, on this machine", attempts)
