"""The Grafana dashboard asks for the planner's metrics, all of them and no others."""

from __future__ import annotations

import json
import re

from tests.deploy.rendering import CHART
from vllm_rfork.planner.metrics import Metrics

DASHBOARD = json.loads((CHART / "files" / "grafana-planner.json").read_text(encoding="utf-8"))


def series() -> dict[str, set[str]]:
    """Every series that the planner can show, with its labels, from the metrics themselves."""
    found: dict[str, set[str]] = {}
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", Metrics(10).page({}).decode(), re.MULTILINE):
        for suffix in ("_bucket", "_count", "_sum") if kind == "histogram" else ("",):
            found[name + suffix] = set()
    return found


def queries() -> list[str]:
    asked = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return asked + [each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]


def test_every_metric_on_the_dashboard_is_one_of_the_planners() -> None:
    used = {name for query in queries() for name in re.findall(r"rfork_planner_\w+", query)}
    assert used <= set(series())
    assert len(used) > 15


def test_every_metric_of_the_planner_is_on_the_dashboard() -> None:
    text = " ".join(queries())
    for name in series():
        if not name.endswith(("_created", "_count", "_sum")):
            assert re.search(rf"\b{name}\b", text), name


def test_panels_lie_beside_each_other_and_ask_whole_questions() -> None:
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["targets"]
    for query in queries():
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
        assert set(re.findall(r"\$(\w+)", query)) <= variables | {"__rate_interval"}
