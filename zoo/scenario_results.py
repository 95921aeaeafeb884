"""What each event must lead to, and whether it did: names, expectations and judgements of ``python -m zoo.events``.

Plain data and pure functions: it starts nothing and knows no vLLM.
"""

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
_WITHDRAWN = "before it begins the planner grants nothing, and the service does not vouch"
_BACK = "a seed again, in a new epoch"

#: Every check by name, in order, with what is expected.
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
    "seed": "offered by the planner, vouched for by the service",
    "reload: withdrawal": _WITHDRAWN,
    "reload: return": _BACK,
    "old epoch: over HTTP": "at the same address the service names its new epoch, and a client refuses the old one",
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

#: What a document's section begins with where there is none yet.
HEAD = """## Events

What befalls seeds and receivers, on whole engines of one Llama with random weights, a process each: `make events`, or
`python -m zoo.events` with the zoo's options and `--write` with this page. *Not here* is what the platform does not
have, in its own words. *Right* is a load or a fork whose every tensor has the default load's SHA-256 and whose tokens
and log-probabilities are the same to the last bit.
"""

#: How a worker says that it has forked.
FORKED = re.compile(r"RFork: forked (?P<nbytes>\d+) bytes .* from seed (?P<seed>\S+), .* layout=(?P<layout>\w+)")
FELL_BACK, NO_SEED, STAYS_AWAY = "falling back to load_format=", "this worker is not a seed: ", "not a seed again: "

#: A service that has stopped, as aiohttp says it.
_ABSENT = re.compile(r"seed http\S+: GET failed: ClientConnectorError: .*")

Lines = list[tuple[str, str]]


class Wrong(Exception):
    """What was seen is not what was expected; the text is what was seen."""


class NotHere(Exception):
    """This platform has no such thing; the text says so in its own words."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: its name, what was expected, what was seen, and one of OK, FAILED, NOT_HERE."""

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
        """One row, once: what comes later to the same name is dropped."""
        row = Row(name, CHECKS[name], " ".join(seen.split()), verdict)
        with self._changed:
            self._rows.setdefault(name, row)
            self._changed.notify_all()

    def close(self) -> None:
        """Let every waiting reader have its row: no other row comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, name: str) -> Row:
        """Return a row once it is there, or, if the sheet is closed without it, a failed one."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or name in self._rows)
            return self._row(name)

    def _row(self, name: str) -> Row:
        return self._rows.get(name) or Row(name, CHECKS[name], "not reached", FAILED)

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[list[str]]:
        """The row of what happens inside, which says what it sees by appending; never raises what went wrong there."""
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
        """Every check in order; those that were not reached have failed."""
        return [self._row(name) for name in CHECKS]


def said(lines: Lines, part: str) -> str:
    """The first line of the log that has ``part`` in it.

    Raises:
        Wrong: there is none; the text has all warnings.
    """
    for _, text in lines:
        if part in text:
            return text
    raise Wrong(f"the log has no {part!r}, but: {warnings(lines)}")


def warnings(lines: Lines) -> str:
    """Everything in the log that is more than information, in one line."""
    return "; ".join(text for level, text in lines if level != "INFO") or "no warning"


def refused(lines: Lines, *parts: str) -> str:
    """The line that says why a worker fell back; one of ``parts`` must be in it, and no fork may be in the log.

    Raises:
        Wrong: it forked, or says something else.
    """
    if forks := [text for _, text in lines if FORKED.search(text)]:
        raise Wrong(f"it forked: {forks[0]}")
    return _with_any(said(lines, FELL_BACK), parts)


def not_a_seed(lines: Lines, *parts: str) -> str:
    """The line that says why a worker is not a seed; one of ``parts`` must be in it.

    Raises:
        Wrong: it says no such thing, or something else.
    """
    return _with_any(said(lines, NO_SEED), parts)


def _with_any(text: str, parts: tuple[str, ...]) -> str:
    if not any(part in text for part in parts):
        raise Wrong(f"none of {parts} in: {text}")
    return text


def forked(lines: Lines, address: str) -> str:
    """That a worker forked from the seed at ``address``, in words.

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
    """The layout that a worker forked in; empty where it did not fork."""
    return next((match["layout"] for _, text in lines if (match := FORKED.search(text))), "")


def equal(
    default: tuple[list[Load], list[Any]], other: tuple[list[Load], list[Any]], layout: str = "", who: str = "it"
) -> str:
    """How much of two workers' loads and answers is equal, in words.

    Raises:
        Wrong: something is not, or there is nothing that could be compared.
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
    """That a seed was withdrawn when somebody looked, in words.

    Raises:
        Wrong: the planner granted it, or the service vouched for it.
    """
    if granted:
        raise Wrong(f"the planner granted {granted}")
    if not refusal:
        raise Wrong("the service vouched for the epoch")
    return f"no grant; {_ABSENT.sub('nobody listens there any more', refusal)}"


def returned(before: str, after: str) -> str:
    """That the epoch is a new one, in words.

    Raises:
        Wrong: there is none, or it is the old one.
    """
    if not after:
        raise Wrong("it is no seed")
    if after == before:
        raise Wrong(f"it is still in epoch {before}")
    return f"epoch {before[:8]} then, {after[:8]} now"


def no_more(what: str, default: int, other: int, bound: int) -> str:
    """That ``other`` bytes are at most ``bound`` more than ``default``, in words.

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
        """Whether any check has."""
        return any(row["verdict"] == FAILED for row in self.rows)

    def count(self) -> str:
        """``30 ok, 2 not here``."""
        verdicts = [row["verdict"] for row in self.rows]
        return ", ".join(f"{verdicts.count(one)} {one}" for one in (OK, FAILED, NOT_HERE) if one in verdicts)


def load(path: Path) -> Outcome:
    """What a run left in its ``events.json``."""
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def table(outcome: Outcome) -> str:
    """The rows of a run as Markdown."""
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
    """Put the table of ``outcome`` into the document at ``path``, in the place of its platform's last one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    begin, end = (f"<!-- {word} events {outcome.facts['platform']} -->" for word in ("begin", "end"))
    section = f"{begin}\n\n{table(outcome)}\n\n{end}"
    if HEAD.partition("\n")[0] not in text.splitlines():
        text = f"{text.rstrip()}\n\n{HEAD}".lstrip()
    before, found, rest = text.partition(begin)
    text = before + section + rest.partition(end)[2] if found else f"{text.rstrip()}\n\n{section}\n"
    path.write_text(text, encoding="utf-8")
