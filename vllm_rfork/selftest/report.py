"""The self-test's report for people, and its exit status."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_rfork.logs.quoting import counted
from vllm_rfork.selftest.attempts import Attempt
from vllm_rfork.selftest.roles import AGAIN, FRESH, MEMCPY, Result

GOOD, WRONG_BYTES, FAILED, TOO_LATE = 0, 1, 3, 4
#: Meanings of the command's exit status; 2 is click's, for wrong usage.
CODES = {
    GOOD: "the bytes are right",
    WRONG_BYTES: "bytes are wrong",
    FAILED: "an engine failed while it read, or no lane is possible",
    TOO_LATE: "too late",
}
_SHOWN = 10


@dataclass(frozen=True)
class Report:
    """The exit status (:data:`CODES`) and the lines to print."""

    code: int
    lines: list[str]


def report(title: str, attempts: Sequence[Attempt], hints: Sequence[str] = ()) -> Report:
    """The report on all attempts of a run, in the order of the engines.

    Args:
        hints: more ways to a faster lane, which no engine of the order names.
    """
    read = [(attempt, attempt.result) for attempt in attempts if attempt.result is not None]
    lines = [title]
    for attempt, result in read:
        lines += _stages(attempt, result)
    right = [result for _, result in read if not result.wrong]
    if len(right) > 1:
        lines += _table(right)
    lines += [f"FAILED: {each.engine}: {each.text}" for each in attempts if each.outcome in ("broke", "late")]
    lines += _refused(attempts)
    if hints:
        lines += ["would be faster:", *(f"  {hint}" for hint in hints)]
    return Report(_code(attempts), lines)


def _code(attempts: Sequence[Attempt]) -> int:
    outcomes = {each.outcome for each in attempts}
    if "wrong" in outcomes:
        return WRONG_BYTES
    if "broke" in outcomes:
        return FAILED
    if "late" in outcomes:
        return TOO_LATE
    return GOOD if "right" in outcomes else FAILED


def _refused(attempts: Sequence[Attempt]) -> list[str]:
    """The lanes that are not possible, those before the first one that works apart from the others."""
    works = next((number for number, each in enumerate(attempts) if each.outcome == "right"), None)
    if works is None:
        parts = {"not possible:": attempts}
    else:
        parts = {
            "preferred, but not possible:": attempts[:works],
            "not possible either:": attempts[works + 1 :],
        }
    lines: list[str] = []
    for heading, part in parts.items():
        reasons = [f"  {each.engine}: {each.text}" for each in part if each.outcome == "refused"]
        lines += [heading, *reasons] if reasons else []
    return lines


def _stages(attempt: Attempt, result: Result) -> list[str]:
    """Lane, digests, and each stage with its seconds and its speed."""
    if result.wrong:
        shown = ", ".join(map(str, result.wrong[:_SHOWN]))
        verdict = f"FAILED: {len(result.wrong)} of {result.count} buffers differ from the seed's digests: {shown}"
    else:
        verdict = "every digest is right"
    lines = [f"lane {result.lane}: {counted(result.count, 'buffer')}, {result.nbytes} bytes; {verdict}"]
    for stage, seconds in result.seconds.items():
        speed = result.gb_per_s(stage)
        shown = "" if speed is None else f"  {speed:7.2f} GB/s{_of_memcpy(result, stage)}"
        lines.append(f"  {stage:<28}{seconds:9.4f} s{shown}")
    return lines


def _of_memcpy(result: Result, stage: str) -> str:
    """The stage's speed as a share of a copy within one process; empty on devices without that comparison."""
    speed, memcpy = result.gb_per_s(stage), result.gb_per_s(MEMCPY)
    return "" if stage == MEMCPY or not speed or not memcpy else f", {speed / memcpy:.2f} of memcpy"


def _table(results: Sequence[Result]) -> list[str]:
    """One line for each lane: the time before the first byte, and the speed of both reads."""
    lines = [f"  {'lane':<28}{'until first byte':>16}{'first read':>16}{'read again':>16}"]
    for result in results:
        before_s = sum(result.seconds.get(stage, 0.0) for stage in ("engine open", "register", "connect"))
        speeds = "".join(f"{result.gb_per_s(stage) or 0.0:11.2f} GB/s" for stage in (FRESH, AGAIN))
        lines.append(f"  {result.lane:<28}{before_s:14.3f} s{speeds}")
    fastest = max(results, key=lambda each: each.gb_per_s(FRESH) or 0.0)  # a fork reads once
    return ["every lane that works:", *lines, f"fastest first read: {fastest.lane}"]
