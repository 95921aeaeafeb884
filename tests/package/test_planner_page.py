"""docs/planner.md names every setting with its default, every metric and the commands, and nothing else of the kind."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_rfork.cli.main import COMMANDS
from vllm_rfork.planner.metrics import Metrics
from vllm_rfork.planner.policy import POLICIES
from vllm_rfork.planner.settings import Settings

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "planner.md").read_text(encoding="utf-8")


def default(value: object) -> str:
    if value is None:
        return "–"
    if value is False:
        return "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_the_table_of_settings_is_the_settings() -> None:
    rows = re.findall(r"^\| `--([a-z-]+)` \| (\S+) \| (.+) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (name.replace("_", "-"), default(field.default), field.description)
        for name, field in Settings.model_fields.items()
    ]


def test_the_table_of_metrics_is_the_metrics() -> None:
    rows = set(re.findall(r"^\| `((?:rfork_planner|process)_\w+)` ", PAGE, re.MULTILINE))
    shown = set(re.findall(r"^# TYPE (\S+) ", Metrics(1).page({}).decode(), re.MULTILINE))
    assert rows == shown, "no series is shown that is not described, the counters' times of creation among them"


def test_policies_and_commands_are_named() -> None:
    assert all(f"`{name}`" in PAGE for name in POLICIES)
    assert set(re.findall(r"vllm-rfork ([a-z]+)", PAGE)) <= set(COMMANDS)
    assert all(f"vllm-rfork {name}" in PAGE for name in ("planner", "seeds", "leases", "key", "doctor"))


def test_flags_in_the_prose_exist() -> None:
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    known |= {"--json", "--engine", "--tp-rank"}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) <= known


def test_what_the_page_points_to_is_there() -> None:
    for page in (DOCS / "planner.md", DOCS.parent / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page.name, target)
