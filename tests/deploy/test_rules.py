"""The alerts: promtool's own tests, and that each asks for series that the planner has."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.rendering import CHART
from tests.deploy.tools import run
from vllm_rfork.planner.metrics import Metrics

RULES = CHART / "files" / "rules.yaml"
CASES = Path(__file__).parent / "rules_test.yaml"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


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


def test_every_alert_asks_for_series_of_the_planner() -> None:
    page = Metrics(10).page({}).decode()
    known = {name for name, _ in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE)}
    for rule in ALERTS:
        used = set(re.findall(r"rfork_planner_\w+", rule["expr"]))
        assert used
        assert used <= known, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in {"warning", "critical"}


def test_promtool_finds_a_wrong_expression(tmp_path: Path) -> None:
    wrong = tmp_path / "rules.yaml"
    wrong.write_text(RULES.read_text(encoding="utf-8").replace(") != 1", ") !== 1"), encoding="utf-8")
    assert run(promtool(), "check", "rules", wrong).returncode != 0


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_series_that_an_alert_counts_begin_at_zero(alert: str) -> None:
    """Prometheus sees no increase in a counter whose first value is 1."""
    page = Metrics(10).page({}).decode()
    (expression,) = [rule["expr"] for rule in ALERTS if rule["alert"] == alert]
    for name, labels in re.findall(r"increase\((\w+)(?:\{([^}]*)\})?", expression):
        assert re.search(rf"^{name}\{{[^}}]*{labels}[^}}]*\}} 0\.0$", page, re.MULTILINE), name
