"""The results of a run as a Markdown table; a document has one per platform, which the next run there replaces."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

#: Smallest model whose rates are meaningful, in bytes.
LARGE_NBYTES = 100_000_000

#: The beginning of a new document.
HEAD = """# The model zoo

Every model below was made on the spot with random weights in a real architecture, and loaded three times, each in a
process of its own: by vLLM's default loader, by a worker that became a seed, and by a worker that forked from that
seed and had no weight files (but for the rows that say why they need them). *Tensors equal* means: every tensor has
the default load's SHA-256, as loaded (where the layout is `checkpoint`) and after post-processing, and every plain
value that a model holds is the same. *Answers equal* means: the greedy tokens and the log-probabilities of the three
best of each step, or the whole embedding, are the same to the last bit, one prompt at a time; with a draft model,
what it proposes in each step as well. With several ranks both hold for every rank against the same rank of the default
load.

*Refused* is what was listed beforehand, with a part of what the log says; the default loader then made the model good,
and a listed refusal that forks is a failure. *Not run* is what vLLM itself cannot load on the platform, with a part of
what it says, likewise listed; *only loaded* what it can load and not run.

The tables are written by the command: `make zoo`, or `python -m zoo --write docs/zoo.md` with its options. It runs on
whatever platform vLLM finds; with large models, on two GPUs:

    python -m zoo --models zoo/large.json --seed-devices 1 --receiver-devices 0 --write docs/zoo.md

Where one device must hold seed and fork, `--llm '{"gpu_memory_utilization": 0.4}'` leaves room for both. Each run
leaves `build/zoo/zoo.json` and a log of every process; `--render A.json B.json --write docs/zoo.md` makes one table of
several runs on one platform.
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run: facts about the platform, the rows as plain data, and its duration in seconds."""

    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    seconds: float


def load(path: Path) -> Outcome:
    """Read the ``zoo.json`` of a run."""
    return Outcome(**json.loads(path.read_text(encoding="utf-8")))


def merged(outcomes: list[Outcome]) -> Outcome:
    """Merge runs on one platform; a later row replaces an earlier one of the same model.

    Raises:
        ValueError: they are not of one platform with one set of versions.
    """
    facts = [{**outcome.facts, "date": None} for outcome in outcomes]
    if any(other != facts[0] for other in facts):
        raise ValueError("these runs were made on different platforms or versions; each gets a table of its own")
    rows = {row["name"]: row for outcome in outcomes for row in outcome.rows}
    return Outcome(outcomes[-1].facts, list(rows.values()), sum(outcome.seconds for outcome in outcomes))


def table(outcome: Outcome) -> str:
    """Return one section of the document."""
    facts = outcome.facts
    count = {
        kind: sum(row["outcome"] == kind for row in outcome.rows) for kind in ("forked", "refused", "not run", "failed")
    }
    lines = [
        f"## {facts['platform']}",
        "",
        f"{facts.get('date', 'no date')}, {facts['device']}, vLLM {facts['vllm']}, "
        f"torch {facts['torch']}, transformers {facts['transformers']}, vllm-rfork {facts['vllm_rfork']}, "
        f"{outcome.seconds / 60:.1f} minutes: "
        + ", ".join(f"{number} {kind}" for kind, number in count.items() if number or kind == "forked")
        + ".",
        "",
        "| model | what is special | loaded as | bytes | tensors | layout | outcome | tensors equal | answers equal |",
        "|---|---|---|---:|---:|---|---|---|---|",
    ]
    for row in outcome.rows:
        outcome_text = row["outcome"]
        if row["outcome"] == "failed":
            outcome_text = "**failed**: " + "; ".join(row["failures"])
        else:
            outcome_text += f": `{row['reason']}`" if row["reason"] else ""
            outcome_text += f" ({row['note']})" if row["note"] else ""
        ranks = f", {row['ranks']} ranks" if row["ranks"] > 1 else ""
        cells = [
            row["name"],
            row["covers"],
            row["architecture"] + ranks,
            f"{row['nbytes']:,}".replace(",", " ") if row["nbytes"] else "",
            str(row["tensors"] or ""),
            row["layout"] + (f", {row['engine']}" if row["engine"] else ""),
            outcome_text,
            _yes(row["digests_equal"]),
            "only loaded" if row["asks"] == "load" and row["outcome"] != "not run" else _yes(row["answers_equal"]),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*lines, *_rates(outcome.rows)]) + "\n"


def _rates(rows: list[dict[str, Any]]) -> list[str]:
    """Return the rates of storage and fork for models that are large enough."""
    large = [row for row in rows if row["nbytes"] >= LARGE_NBYTES and row["fork_s"] and row["storage_s"]]
    if not large:
        return []
    lines = [
        "",
        "The weights phase alone, slowest rank: the default loader, from page cache, and the fork.",
        "",
        "| model | GB | default loader, s | GB/s | fork, s | GB/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in large:
        size, storage_s, fork_s = row["nbytes"] / 1e9, row["storage_s"], row["fork_s"]
        cells = (f"{size:.2f}", f"{storage_s:.2f}", f"{size / storage_s:.2f}", f"{fork_s:.2f}", f"{size / fork_s:.2f}")
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "**no**"


def replace(path: Path, outcome: Outcome) -> None:
    """Write the table of ``outcome`` into the document at ``path``, in place of its platform's last one."""
    text = path.read_text(encoding="utf-8") if path.exists() else HEAD
    begin, end = (f"<!-- {word} {outcome.facts['platform']} -->" for word in ("begin", "end"))
    section = f"{begin}\n\n{table(outcome)}\n{end}"
    before, found, rest = text.partition(begin)
    text = before + section + rest.partition(end)[2] if found else f"{text.rstrip()}\n\n{section}\n"
    path.write_text(text, encoding="utf-8")
