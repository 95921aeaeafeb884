"""The results of a run as a Markdown table; a document has one per platform, which the next run there replaces."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

#: Smallest model whose rates are meaningful, in bytes.
LARGE_NBYTES = 100_000_000

#: The beginning of a new document; docs/zoo.md explains the words of the tables.
HEAD = "# The model zoo\n"


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
