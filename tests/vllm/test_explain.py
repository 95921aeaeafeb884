"""``vllm-rfork explain`` names the fact in which two real workers differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.vllm.conftest import SeedProcess, extra_for
from vllm_rfork.cli.main import main
from zoo.planner import Planner, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.long]


#: The arguments of ``engine_process.vllm_config``.
ARGUMENTS = ("--skip-tokenizer-init", "--enforce-eager", "--max-model-len", "64", "--load-format", "rfork")


def test_explain_names_the_fact_that_differs_between_two_workers(
    vllm_imported: None, fleet_planner: Planner, model_a: Path
) -> None:
    extra = extra_for(fleet_planner.url, rfork_heartbeat_interval_sec=2.0)
    workers = [SeedProcess(model_a, extra, dtype=dtype) for dtype in ("bfloat16", "float16")]
    try:
        here, there = (worker.said["seeds"][0] for worker in workers)
        eventually(lambda: len(fleet_planner.seeds()) == 2, "both seeds are announced")
        named = ("--model-url", "tiny", "--strategy", "test")
        running = explain(1, "--url", fleet_planner.url, *named, "--worker", here.rpartition(":")[0])
        options = (*ARGUMENTS, "--model-loader-extra-config", json.dumps(extra))
        would_pair = explain(0, "--", str(model_a), "--dtype", "float16", *options)
        would_not = explain(1, "--", str(model_a), "--dtype", "float32", *options)
    finally:
        for worker in workers:
            worker.end()
    difference = {"fact": "dtype", "here": "bfloat16", "there": "float16"}
    assert results(running) == {here: ("itself", []), there: ("differs", [difference])}
    assert running["answer"] == {"pairs": False, "text": "it would load from storage (fingerprint)"}
    # The prediction has the fingerprint that a worker with these arguments has.
    assert results(would_pair)[there] == ("pairs", [])
    assert results(would_pair)[here] == ("differs", [{"fact": "dtype", "here": "float16", "there": "bfloat16"}])
    assert [each["result"] for each in would_not["seeds"]] == ["differs", "differs"]


def explain(status: int, *arguments: str) -> dict[str, Any]:
    """The JSON output of the command, which must end with ``status``."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    with_json = [*arguments[:place], "--json", *arguments[place:]]
    done = CliRunner().invoke(main, ["explain", *with_json])
    assert done.exit_code == status, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def results(found: dict[str, Any]) -> dict[str, tuple[str, list[dict[str, str]]]]:
    return {each["seed"]: (each["result"], each["differences"]) for each in found["seeds"]}
