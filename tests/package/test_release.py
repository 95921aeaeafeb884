"""The check before an upload: it names what the bill of materials lacks, and the steps that are left."""

from __future__ import annotations

import json
from email.message import Message

import pytest

from scripts import check_release


def wheel(url: str = "https://forge.org/vllm-rfork") -> Message:
    described = Message()
    for name, value in (
        ("Name", "vllm-rfork"),
        ("Version", "1.2.0"),
        ("Project-URL", f"Repository, {url}"),
        ("Requires-Dist", "prometheus-client>=0.20"),
        ("Requires-Dist", "redis>=5; extra == 'redis'"),
    ):
        described[name] = value
    return described


def bill(**versions: str) -> str:
    return json.dumps({"components": [{"name": name, "version": version} for name, version in versions.items()]})


def test_what_the_bill_of_materials_lacks_is_named() -> None:
    def missing(**versions: str) -> list[str]:
        return check_release.missing_materials(bill(**versions), wheel())

    assert missing(vllm_rfork="1.2.0", prometheus_client="0.26") == []
    assert missing(vllm_rfork="1.2.0", redis="5") == ["prometheus-client"]
    assert missing(vllm_rfork="1.1.0", prometheus_client="0.26") == ["vllm-rfork 1.2.0"]
    assert missing() == ["prometheus-client", "vllm-rfork 1.2.0"]


@pytest.mark.parametrize(
    ("url", "changelog", "steps"),
    [
        ("https://forge.org/vllm-rfork", "## [1.2.0] - 2026-12-01\n", 0),
        ("https://forge.org/vllm-rfork", "## [1.2.0]\n", 1),
        ("https://forge.org/vllm-rfork", "## [1.2.0.1] - 2026-12-01\n", 1),
        ("https://forge.example/vllm-rfork", "## [1.2.0] - 2026-12-01\n", 1),
        ("https://forge.example/vllm-rfork", "## [Unreleased]\n", 2),
    ],
)
def test_steps_that_are_left_are_named(url: str, changelog: str, steps: int) -> None:
    assert len(check_release.steps_left(wheel(url), changelog)) == steps
