"""docs/operations.md has every command, and docs/metrics.md every metric of a worker with its labels."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_rfork.cli.main import COMMANDS
from vllm_rfork.metrics.families import FAMILIES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_table_of_commands_is_the_commands() -> None:
    section = (DOCS / "operations.md").read_text(encoding="utf-8").split("## Ports")[0]
    rows = re.findall(r"^\| (`vllm-rfork \w+`(?:, `vllm-rfork \w+`)*) \|", section, re.MULTILINE)
    assert [name for row in rows for name in re.findall(r"rfork (\w+)", row)] == list(COMMANDS)


def test_the_table_of_metrics_is_the_metrics() -> None:
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(rfork_\w+)` \|([^|]*)\|", page, re.MULTILINE)
    assert dict((name, tuple(re.findall(r"`(\w+)`", labels))) for name, labels in rows) == {
        family.name: tuple(family.labels) for family in FAMILIES
    }
