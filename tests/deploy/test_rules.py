"""The alerts: promtool's own tests, and that each asks for series that the planner has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.rendering import CHART
from tests.deploy.tools import run
from vllm_rfork.messages import MISSES
from vllm_rfork.messages.causes import CAUSES
from vllm_rfork.metrics.families import FAMILIES, REASONS
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.store.base import Store, Totals
from vllm_rfork.planner.store.errors import UNREACHABLE

RULES = CHART / "files" / "rules.yaml"
CASES = Path(__file__).parent / "rules_test.yaml"
EVERY = [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in EVERY if "alert" in rule]


def page() -> str:
    """The planner's page, with series of one key."""
    metrics = Metrics(10)
    return metrics.page({"k": Totals(seeds=1)}).decode()


def promtool() -> str:
    found = shutil.which("promtool")
    assert found is not None, "promtool is missing (Debian: apt-get install prometheus)"
    return found


def test_every_rule_passes_promtools_checks() -> None:
    done = run(promtool(), "check", "rules", RULES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_and_rests() -> None:
    done = run(promtool(), "test", "rules", CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    cases: list[dict[str, Any]] = [
        case for test in yaml.safe_load(CASES.read_text(encoding="utf-8"))["tests"] for case in test["alert_rule_test"]
    ]
    for alert in (rule["alert"] for rule in ALERTS):
        states = {bool(case.get("exp_alerts")) for case in cases if case["alertname"] == alert}
        assert states == {True, False}, alert


def test_every_rule_asks_for_series_of_the_planner_or_the_workers() -> None:
    known = {name for name, _ in re.findall(r"^# TYPE (\S+) (\S+)$", page(), re.MULTILINE)}
    known |= {family.name for family in FAMILIES}
    for rule in EVERY:
        used = {name.removesuffix("_bucket") for name in re.findall(r"\brfork_\w+", rule["expr"])}
        assert used
        assert used <= known, rule
    for rule in ALERTS:
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in {"warning", "critical"}


def test_values_of_labels_that_rules_name_exist() -> None:
    words = {
        "reason": {*REASONS, *MISSES, UNREACHABLE},
        "cause": CAUSES,
        "kind": set(re.findall(r'events_total\{kind="(\w+)"\} 0', page())),
        "state": {"serving", "draining", "aside", "absent"},
        "result": {"ok", "failed", "released"},
        "outcome": {"ok", "failed"},
        "operation": Store.__abstractmethods__,
    }
    for rule in EVERY:
        for name, values in re.findall(r'(\w+)(?:=|!=|=~|!~)"([^"]*)"', rule["expr"]):
            assert set(values.split("|")) <= words[name], rule


def test_the_planners_page_passes_promtools_checks() -> None:
    done = subprocess.run([promtool(), "check", "metrics"], input=page(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_promtool_finds_a_wrong_expression(tmp_path: Path) -> None:
    wrong = tmp_path / "rules.yaml"
    wrong.write_text(RULES.read_text(encoding="utf-8").replace(") != 1", ") !== 1"), encoding="utf-8")
    assert run(promtool(), "check", "rules", wrong).returncode != 0


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_series_that_an_alert_counts_begin_at_zero(alert: str) -> None:
    """Prometheus sees no increase in a counter whose first value is 1."""
    (expression,) = [rule["expr"] for rule in ALERTS if rule["alert"] == alert]
    for name, labels in re.findall(r"increase\((\w+)(?:\{([^}]*)\})?", expression):
        assert re.search(rf"^{name}\{{[^}}]*{labels}[^}}]*\}} 0\.0$", page(), re.MULTILINE), name
