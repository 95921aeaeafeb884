"""docs/options.md has every option and every variable of a worker, in the order of the settings, and no other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vllm_rfork.config import ENVIRONMENT, NEEDED, Settings, parse_config

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "options.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `((?:rfork|model)_\w+)` \| (?:`(\w+)`)? *\| ([^|]*?) *\| (.+) \|$", PAGE, re.MULTILINE)


def test_the_table_is_the_settings() -> None:
    assert [name for name, *_ in ROWS] == list(Settings.model_fields)
    assert {name: variable for name, variable, *_ in ROWS if variable} == ENVIRONMENT


@pytest.mark.parametrize(("name", "default"), [(name, default) for name, _, default, _ in ROWS])
def test_each_default_is_the_codes(name: str, default: str) -> None:
    """Where the code has none, the page describes what happens in words."""
    value = Settings.model_fields[name].default
    if value in ("", None):
        assert not re.fullmatch(r"`.*`|[\d.]+|true|false", default) or name == "rfork_labels", default
    else:
        assert default.strip("`") == (
            str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
        )


def test_the_required_options_are_marked() -> None:
    assert {name for name, *_, text in ROWS if text.endswith("Required.")} == set(NEEDED)


def test_the_example_is_a_configuration() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    parsed = parse_config(json.loads(example), {})
    assert parsed.settings.missing == []
    assert parsed.passed_through == {}
