"""What the planner writes as JSON is JSON, whatever was announced and reported."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest

from tests.planner.test_api import planner
from vllm_rfork.planner.http import valid_json
from vllm_rfork.planner.logs import JsonLines


def strict(text: str | bytes) -> Any:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("text", ["key", "k\udcff"])
def test_numbers_that_json_lacks_become_null(number: float, text: str) -> None:
    assert strict(valid_json.encode({text: [number, 1.5]})) == {text.replace("\udcff", "\\udcff"): [None, 1.5]}


def test_a_log_line_is_json_whatever_its_fields_hold() -> None:
    record = logging.makeLogRecord({"msg": "m", "seconds": math.inf, "key": "k\udcff", "other": object})
    line = strict(JsonLines().format(record))
    assert (line["seconds"], line["key"], line["other"]) == (None, "k\\udcff", "<class 'object'>")


async def test_no_report_makes_the_dashboard_or_the_snapshot_something_else_than_json() -> None:
    async with planner() as client:
        await client.add()
        report = {"RFORK-RESULT": "ok", "RFORK-NBYTES": "9999999999999999"}
        for seconds, status in [("5e-324", 400), ("0", 200), ("0.00000000000000000001", 200)]:
            lease = await client.lease()
            assert await client.status("POST", "/put_seed", **lease, **report, **{"RFORK-SECONDS": seconds}) == status
            if status != 200:
                assert await client.status("POST", "/put_seed", **lease) == 200
        for path in ("/dashboard.json", "/debug/snapshot"):
            forks = strict((await client.call("GET", path))[2])["history"]
            assert len(forks) == 3
