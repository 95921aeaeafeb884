"""The checks of ``python -m zoo.events``: their names, expectations and verdicts. Plain data and pure functions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo.observe import Load
from zoo.run import differences

OK, FAILED, NOT_HERE = "ok", "FAILED", "not here"

#: How much more of a device's memory a fork may hold than a default load, in bytes: at rest nothing but rounding, at
#: its peak the buffers of the digest (``vllm_rfork.model.digest`` states 22 MB, and 17 more at odd addresses).
MORE_AT_REST, MORE_AT_PEAK = 2 << 20, 40_000_000

_RIGHT = "right: every tensor and every answer is the default load's"
_NOT_A_SEED = "not a seed, with the reason in the log"
_NO_FORK = "no fork, with the reason in the log"
_WITHDRAWN = "before it begins, the planner grants nothing and the service refuses"
_BACK = "a seed again, in a new epoch"

#: Every check by name, in order, with its expectation.
CHECKS: dict[str, str] = {
    "default load": "loads and answers differently to different prompts",
    "sleep mode: as a seed": _NOT_A_SEED,
    "sleep mode: as a receiver": _NO_FORK,
    "sleep mode: default loader": _RIGHT,
    "sleep mode: after sleep and wake-up": "answers as before",
    "expandable segments, by variable: as a seed": _NOT_A_SEED,
    "expandable segments, by variable: as a receiver": _NO_FORK,
    "expandable segments, by variable: default loader": _RIGHT,
    "expandable segments, by call: as a seed": _NOT_A_SEED,
    "expandable segments, by call: as a receiver": _NO_FORK,
    "expandable segments, by call: default loader": _RIGHT,
    "seed": "granted by the planner, confirmed by the service",
    "reload: withdrawal": _WITHDRAWN,
    "reload: return": _BACK,
    "old epoch: over HTTP": "at the same address the service returns its new epoch, and a client rejects the old one",
    "old epoch: a receiver that holds it": "refused for its epoch, and never reads",
    "old epoch: default loader": _RIGHT,
    "weight update: withdrawal": _WITHDRAWN,
    "weight update: return": _BACK,
    "sleep of a seed: withdrawal": _WITHDRAWN,
    "sleep of a seed: return": _BACK,
    "caches reset": "the same seed in the same epoch",
    "fork after all of this": f"a fork, and {_RIGHT}",
    "memory at rest": f"at most {MORE_AT_REST} bytes more than the default load",
    "memory at its peak": f"at most {MORE_AT_PEAK} bytes more than the default load",
    "other weights: withdrawal": _WITHDRAWN,
    "other weights: away": "no seed, with the reason in the log; other answers",
    "right weights again": _BACK,
    "altered byte: verification": "refused by digest, naming the tensor",
    "altered byte: default loader": _RIGHT,
    "memory after a fallback": f"at most {MORE_AT_REST} bytes more than the default load",
    "seed killed while it serves and is read": "no fork, with the reason in the log",
    "seed killed: default loader": _RIGHT,
    "seed killed: the planner": "grants it to nobody, within 10 s",
}

#: The beginning of a new section; docs/zoo.md explains the words of the tables.
HEAD = "## Events\n"

#: The log line of a completed fork.
FORKED = re.compile(r"RFork: forked (?P<nbytes>\d+) bytes .* from seed (?P<seed>\S+), .* layout=(?P<layout>\w+)")
FELL_BACK, NO_SEED, STAYS_AWAY = "falling back to load_format=", "this worker is not a seed: ", "not a seed again: "

#: The error of aiohttp for a service that has stopped.
_ABSENT = re.compile(r"seed http\S+: GET failed: ClientConnectorError: .*")

Lines = list[tuple[str, str]]


class Wrong(Exception):
    """An observation that differs from the expectation; the text is the observation."""


class NotHere(Exception):
    """The platform lacks the feature; the text is its own message."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: its name, the expectation, the observation, and one of OK, FAILED, NOT_HERE."""

    name: str
    expected: str
    seen: str
    verdict: str

    def __str__(self) -> str:
        return f"{self.name} | expected: {self.expected} | seen: {self.seen} | {self.verdict}"


class Sheet:
    """The rows so far, from any thread; a reader can wait for one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rows: dict[str, Row] = {}
        self._closed = False

    def put(self, name: str, seen: str, verdict: str) -> None:
        """Add a row; a second row of the same name is dropped."""
        row = Row(name, CHECKS[name], " ".join(seen.split()), verdict)
        with self._changed:
            self._rows.setdefault(name, row)
            self._changed.notify_all()

    def close(self) -> None:
        """Wake all waiting readers: no more rows follow."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, name: str) -> Row:
        """Return a row once it exists; if the sheet is closed without it, a failed one."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or name in self._rows)
            return self._row(name)

    def _row(self, name: str) -> Row:
        return self._rows.get(name) or Row(name, CHECKS[name], "not reached", FAILED)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[list[str]]:
        """Make the row of the block, which appends its observations. Errors in the block become a failed row."""
        seen: list[str] = []
        try:
            yield seen
        except NotHere as reason:
            self.put(name, str(reason), NOT_HERE)
        except Exception as error:  # noqa: BLE001 - whatever it is, the check has failed, and others go on
            kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
            self.put(name, "; ".join([*seen, f"{kind}{error}"]), FAILED)
        else:
            self.put(name, "; ".join(dict.fromkeys(seen)), OK)

    def rows(self) -> list[Row]:
        """Return every check in order; those that were not reached have failed."""
        return [self._row(name) for name in CHECKS]


def said(lines: Lines, part: str) -> str:
    """Return the first log line that contains ``part``.

    Raises:
        Wrong: no line does; the text has all warnings.
    """
    for _, text in lines:
        if part in text:
            return text
    raise Wrong(f"the log has no {part!r}, but: {warnings(lines)}")


def warnings(lines: Lines) -> str:
    """Join all log lines above INFO."""
    return "; ".join(text for level, text in lines if level != "INFO") or "no warning"


def refused(lines: Lines, *parts: str) -> str:
    """Return the log line of a worker's fallback; it must contain one of ``parts``, and the log must not have a fork.

    Raises:
        Wrong: it forked, or the line has another reason.
    """
    if forks := [text for _, text in lines if FORKED.search(text)]:
        raise Wrong(f"it forked: {forks[0]}")
    return _with_any(said(lines, FELL_BACK), parts)


def not_a_seed(lines: Lines, *parts: str) -> str:
    """Return the log line of a worker that is not a seed; it must contain one of ``parts``.

    Raises:
        Wrong: there is no such line, or it has another reason.
    """
    return _with_any(said(lines, NO_SEED), parts)


def _with_any(text: str, parts: tuple[str, ...]) -> str:
    if not any(part in text for part in parts):
        raise Wrong(f"none of {parts} in: {text}")
    return text


def forked(lines: Lines, address: str) -> str:
    """Describe a worker's fork from the seed at ``address``.

    Raises:
        Wrong: it did not, or from another.
    """
    for _, text in lines:
        if match := FORKED.search(text):
            if match["seed"] != address:
                raise Wrong(f"it forked from {match['seed']}, not from {address}")
            return f"forked {match['nbytes']} bytes, layout {match['layout']}"
    raise Wrong(f"it did not fork: {warnings(lines)}")


def layout_of(lines: Lines) -> str:
    """Return the layout of a worker's fork; empty if it did not fork."""
    return next((match["layout"] for _, text in lines if (match := FORKED.search(text))), "")


def equal(
    default: tuple[list[Load], list[Any]], other: tuple[list[Load], list[Any]], layout: str = "", who: str = "it"
) -> str:
    """Describe the equality of two workers' loads and answers.

    Raises:
        Wrong: something differs, or there is nothing to compare.
    """
    (ours, asked), (theirs, answered) = default, other
    if len(ours) != len(theirs):
        raise Wrong(f"{who} holds {len(theirs)} models, the default load {len(ours)}")
    if not asked or not ours or not all(load.after for load in ours):
        raise Wrong("there is nothing to compare with")
    found = [text for one, two in zip(ours, theirs, strict=True) for text in differences(one, two, layout=layout)]
    if answered != asked:
        found.append("the answers differ")
    if found:
        raise Wrong("; ".join(found))
    return f"{sum(len(load.after) for load in ours)} tensors and {len(asked)} answers equal"


def withdrawn(granted: str, refusal: str) -> str:
    """Describe the absence of a withdrawn seed.

    Raises:
        Wrong: the planner granted it, or the service vouched for it.
    """
    if granted:
        raise Wrong(f"the planner granted {granted}")
    if not refusal:
        raise Wrong("the service vouched for the epoch")
    return f"no grant; {_ABSENT.sub('nobody listens there any more', refusal)}"


def returned(before: str, after: str) -> str:
    """Describe the change of the epoch.

    Raises:
        Wrong: there is none, or it is the old one.
    """
    if not after:
        raise Wrong("it is no seed")
    if after == before:
        raise Wrong(f"it is still in epoch {before}")
    return f"epoch {before[:8]} then, {after[:8]} now"


def no_more(what: str, default: int, other: int, bound: int) -> str:
    """Describe the difference between ``other`` and ``default`` bytes, which is at most ``bound``.

    Raises:
        Wrong: they are more.
    """
    text = f"{what} {other} bytes, the default load's {default}: {other - default:+d}"
    if other - default > bound:
        raise Wrong(text)
    return text


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run: facts about the platform, its rows as plain data, and its duration in seconds."""

    facts: dict[str, Any]
    rows: list[dict[str, str]]
    seconds: float

    @property
    def failed(self) -> bool:
        """True if any check has failed."""
        return any(row["verdict"] == FAILED for row in self.rows)

    def count(self) -> str:
        """``30 ok, 2 not here``."""
        verdicts = [row["verdict"] for row in self.rows]
        return ", ".join(f"{verdicts.count(one)} {one}" for one in (OK, FAILED, NOT_HERE) if one in verdicts)


def load(path: Path) -> Outcome:
    """Read the ``events.json`` of a run."""
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def table(outcome: Outcome) -> str:
    """Return the rows of a run as Markdown."""
    facts = outcome.facts
    lines = [
        f"### Events on {facts['platform']}",
        "",
        f"{facts['date']}, {facts['device']}, vLLM {facts['vllm']}, torch {facts['torch']}, transformers "
        f"{facts['transformers']}, vllm-rfork {facts['vllm_rfork']}, {outcome.seconds:.0f} s: {outcome.count()}.",
        "",
        "| event | expected | seen | |",
        "|---|---|---|---|",
    ]
    for row in outcome.rows:
        verdict = f"**{FAILED}**" if row["verdict"] == FAILED else row["verdict"]
        cells = [row["name"], row["expected"], row["seen"], verdict]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def replace(path: Path, outcome: Outcome) -> None:
    """Write the table of ``outcome`` into the document at ``path``, in place of its platform's last one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    begin, end = (f"<!-- {word} events {outcome.facts['platform']} -->" for word in ("begin", "end"))
    section = f"{begin}\n\n{table(outcome)}\n\n{end}"
    if HEAD.partition("\n")[0] not in text.splitlines():
        text = f"{text.rstrip()}\n\n{HEAD}".lstrip()
    before, found, rest = text.partition(begin)
    text = before + section + rest.partition(end)[2] if found else f"{text.rstrip()}\n\n{section}\n"
    path.write_text(text, encoding="utf-8")
