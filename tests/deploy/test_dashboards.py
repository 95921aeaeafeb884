"""The Grafana dashboards ask for the metrics of planner and workers, all of them and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.rendering import CHART
from tests.deploy.test_rules import page, promtool
from tests.deploy.tools import run
from vllm_rfork.metrics.families import FAMILIES

FILES = CHART / "files"
DASHBOARDS: dict[str, dict[str, Any]] = {
    name: json.loads((FILES / f"grafana-{name}.json").read_text(encoding="utf-8")) for name in ("planner", "workers")
}
each_dashboard = pytest.mark.parametrize("name", sorted(DASHBOARDS))


def series(name: str) -> dict[str, str]:
    """Every metric that the dashboard is about, and its kind, from the metrics themselves."""
    if name == "workers":
        return {family.name: family.kind for family in FAMILIES}
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", page(), re.MULTILINE))


def sampled(name: str) -> set[str]:
    """The names of all samples of these metrics."""
    suffixes = {"histogram": ("_bucket", "_count", "_sum")}
    return {metric + each for metric, kind in series(name).items() for each in suffixes.get(kind, ("",))}


def queries(name: str) -> list[str]:
    """The queries of panels."""
    return [target["expr"] for panel in DASHBOARDS[name]["panels"] for target in panel["targets"]]


def everything(name: str) -> list[str]:
    """The queries of panels and variables."""
    variables = DASHBOARDS[name]["templating"]["list"]
    return queries(name) + [each["query"]["query"] for each in variables if each["type"] == "query"]


def test_the_chart_ships_these_dashboards() -> None:
    assert {path.name for path in FILES.glob("grafana-*.json")} == {f"grafana-{name}.json" for name in DASHBOARDS}
    assert len({each["uid"] for each in DASHBOARDS.values()}) == len(DASHBOARDS)


@each_dashboard
def test_every_metric_on_the_dashboard_exists(name: str) -> None:
    used = {metric for query in everything(name) for metric in re.findall(r"\b(?:rfork|process)_\w+", query)}
    assert used <= sampled(name)
    assert len(used) > 10


@each_dashboard
def test_every_metric_is_on_the_dashboard(name: str) -> None:
    text = " ".join(queries(name))
    for metric, kind in series(name).items():
        assert re.search(rf"\b{metric}{'_bucket' if kind == 'histogram' else ''}\b", text), metric


@each_dashboard
def test_panels_lie_beside_each_other_and_ask_for_known_variables(name: str) -> None:
    dashboard, taken = DASHBOARDS[name], set[tuple[int, int]]()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["targets"]
        assert panel["description"].endswith("."), panel["title"]
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    assert "model" in variables
    for query in everything(name):
        assert set(re.findall(r"\$(\w+)", query)) <= variables | {"__rate_interval"}


@each_dashboard
def test_every_query_is_one_for_prometheus(name: str, tmp_path: Path) -> None:
    asked = [re.sub(r"\$\w+", "x", query.replace("$__rate_interval", "5m")) for query in queries(name)]
    rules = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(asked)]
    file = tmp_path / "rules.yaml"
    for wrong in ([], [{"record": "query:wrong", "expr": "sum(x"}]):
        file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules + wrong}]}), encoding="utf-8")
        done = run(promtool(), "check", "rules", file)
        assert (done.returncode == 0) == (not wrong), done.stdout + done.stderr


def series_by_model() -> Iterator[str]:
    """The metrics of the planner that have the label ``model``."""
    for metric in series("planner"):
        if re.search(rf"^{metric}\{{[^}}]*model=", page(), re.MULTILINE):
            yield metric


def test_every_series_by_model_is_chosen_by_the_variable() -> None:
    names = [*series_by_model(), *series("workers")]
    assert len(names) > 12
    for query in (*queries("planner"), *queries("workers")):
        for sample, selector in re.findall(r"\b(rfork_\w+)\{([^}]*)\}", query):
            if sample in names or re.sub(r"_(bucket|sum|count)$", "", sample) in names:
                assert 'model=~"$model"' in selector, query
