"""docs/operations.md has every command, and docs/metrics.md every metric of a worker, and every alert."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from vllm_rfork.cli.main import COMMANDS
from vllm_rfork.metrics.families import FAMILIES
from vllm_rfork.planner.settings import Settings
from vllm_rfork.selftest.offer import PORT

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RULES = ROOT / "deploy" / "helm" / "vllm-rfork" / "files" / "rules.yaml"


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


def test_the_table_of_alerts_is_the_rules() -> None:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    alerts = [
        (rule["alert"], rule["labels"]["severity"]) for group in groups for rule in group["rules"] if "alert" in rule
    ]
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(RFork\w+)` \| (\w+) \|", page, re.MULTILINE) == alerts


def test_the_table_of_ports_has_the_default_ports() -> None:
    section = (DOCS / "operations.md").read_text(encoding="utf-8").split("## Ports")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| [^|]*?, (\d+)[ |]", section, re.MULTILINE)) >= {str(Settings().port), str(PORT)}


def test_a_sample_has_no_figures_of_a_lane_that_was_not_measured() -> None:
    page = (DOCS / "tuning.md").read_text(encoding="utf-8")
    measured = {lane: figure for lane, figure in re.findall(r"^\| `([\w/]+)`[^|]*\| ([^|]+) \|", page, re.MULTILINE)}
    assert measured["nixl/rdma"] == "not measured"
    for line in re.findall(r"^RFork: forked .*GB/s.*$", page, re.MULTILINE):
        lane = re.search(r" lane=(\S+) ", line)
        assert lane
        assert re.match(r"\d", measured[lane[1]]), line
