"""A draft whose fork fails when it has written: it is built anew, and the target that is there already is not hurt."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import extra_for
from tests.vllm.draft_process import Seen, play
from zoo.workers import ENGINE_ARGUMENTS, GENERATE, Order, Report

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@dataclasses.dataclass(frozen=True)
class Engines:
    """What an engine with vLLM's default loader said, and one whose draft's fork had failed."""

    default: Report
    failed: Report
    seen: Seen


@pytest.fixture(scope="module")
def engines(vllm_imported: None, model_a: Path, model_b: Path, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Both at once; model A is the target and B, of the same shape, the draft."""
    context, logs = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("drafts")
    draft = {"method": "draft_model", "model": str(model_b), "num_speculative_tokens": 2}
    base: dict[str, Any] = {**ENGINE_ARGUMENTS, "model": str(model_a), "speculative_config": draft}
    extra = extra_for("http://127.0.0.1:9", rfork_become_seed=False)
    running = []
    for name, more in (("auto", {}), ("rfork", {"model_loader_extra_config": extra})):
        ours, theirs = context.Pipe()
        order = Order({**base, "load_format": name, **more}, GENERATE, str(logs / f"{name}.log"), drafts=True)
        process = context.Process(target=play, args=(order, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    try:
        found = []
        for _, connection in running:
            assert connection.poll(600), f"no report; see {logs}"
            found.append(connection.recv())
        (default, _), (failed, seen) = found
        return Engines(default, failed, seen)
    finally:
        for process, connection in running:
            connection.close()
            process.join(10)
            process.kill()


def test_the_draft_s_fork_has_written_and_was_thrown_away(engines: Engines) -> None:
    """Else the tests below would show nothing."""
    warnings = [line for level, line in engines.failed.lines if level == "WARNING" and "falling back" in line]
    assert len(warnings) == 1, engines.failed.lines
    assert "the seed died" in warnings[0]
    assert engines.seen.built == 3, "a target, a draft that failed, and a draft"
    assert engines.seen.written > 10


def test_the_target_s_layers_stay_and_the_draft_s_are_there_once(engines: Engines) -> None:
    """Cleared registries would leave the target without caches, and stale ones would fail or hold the failed draft."""
    seen = engines.seen
    assert len(seen.layers_before) == 2, "the target's layers have entered themselves"
    assert {name: seen.layers_after.get(name) for name in seen.layers_before} == seen.layers_before
    assert sorted(seen.layers_after.keys() - seen.layers_before) == [
        f"draft_model.model.layers.{number}.self_attn.attn" for number in range(2)
    ]
    assert seen.strangers == []


def test_rotary_tables_that_both_models_share_are_what_they_were(engines: Engines) -> None:
    seen = engines.seen
    assert len(seen.rotary_before) == 1
    assert seen.rotary_after == seen.rotary_before


def test_the_engine_answers_and_drafts_as_with_the_default_loader(engines: Engines) -> None:
    assert [engines.default.error, engines.failed.error] == ["", ""]
    assert engines.failed.answers == engines.default.answers
    *answers, (kind, drafted) = engines.failed.answers
    assert kind == "drafts"
    assert drafted, "the draft has a part in it"
    assert len({str(answer) for answer in answers}) == len(answers)
    assert [load.after for load in engines.failed.loads] == [load.after for load in engines.default.loads]
