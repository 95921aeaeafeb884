"""The zoo's judgement: each way in which a fork can be wrong, and each way in which a list can be, is a failure."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zoo import __main__ as command
from zoo import case, plugin, results, run
from zoo.case import Case
from zoo.catalogue import CATALOGUE
from zoo.observe import Load
from zoo.run import FORKED, REFUSED, Reports, Row
from zoo.workers import GENERATE, Report

LINE = (
    "INFO",
    "RFork: forked 12 bytes (0.00 GB) in 0.25 s (0.00 GB/s) from seed 1:2:0, engine=nixl layout={} (stages)",
)
MODEL = Case("m", "all", "LlamaForCausalLM")
LOAD = Load("Llama", {"w": "a", "b": "b"}, 2, 12, {"w": "c"}, {"scale": 1.0})


def judged(
    fork: Report, *, refused: str | None = None, what: Case = MODEL, seed: Load = LOAD, layout: str = "checkpoint"
) -> Row:
    """What the zoo makes of ``fork``, with a default load and a seed that are as they should be."""
    fork = dataclasses.replace(fork, lines=[(level, text.format(layout)) for level, text in fork.lines])
    row = Row("m", "all", "failed", asks=GENERATE)
    default = Report(loads=[LOAD], answers=[[1, 2]])
    run._judge(what, refused, Reports([default], [Report(loads=[seed])], [fork]), row)
    return row


def good(**changes: object) -> Report:
    return dataclasses.replace(Report(loads=[LOAD], answers=[[1, 2]], lines=[LINE]), **changes)  # type: ignore[arg-type]


def test_a_fork_that_equals_the_default_load_is_one() -> None:
    row = judged(good())
    assert (row.outcome, row.failures, row.digests_equal, row.answers_equal) == (FORKED, [], True, True)
    assert (row.layout, row.engine, row.fork_s) == ("checkpoint", "nixl", 0.25)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"before": {"w": "x", "b": "b"}}, "tensors as loaded differ: w"),
        ({"before": {"w": "a"}}, "b (b | absent)"),
        ({"after": {"w": "x"}}, "tensors after post-processing differ: w"),
        ({"after": {"w": "c", "new": "d"}}, "new (absent | d)"),
        ({"state": {"scale": 2.0}}, "values differ: scale (1.0 | 2.0)"),
    ],
)
def test_any_difference_is_a_failure(changed: dict[str, dict[str, str]], said: str) -> None:
    row = judged(good(loads=[dataclasses.replace(LOAD, **changed)]))  # type: ignore[arg-type]
    assert any(said in failure for failure in row.failures), row.failures
    assert row.digests_equal is False


def test_other_answers_a_missing_fork_and_a_missing_model_are_failures() -> None:
    assert "answers otherwise" in judged(good(answers=[[1, 3]])).failures[0]
    assert "0 of 1 models were forked: because" in judged(good(lines=[("WARNING", "because")])).failures[0]
    assert "loaded 0 models" in judged(good(loads=[])).failures[0]


def test_a_listed_refusal_must_happen_for_its_reason_and_end_in_the_default_model() -> None:
    refusing = good(lines=[("WARNING", "falling back: no bias here")])
    row = judged(refusing, refused="no bias")
    assert (row.outcome, row.failures, row.digests_equal) == (REFUSED, [], True)
    assert "and it forks" in judged(good(), refused="no bias").failures[0]
    assert "but the log says" in judged(refusing, refused="another reason").failures[0]
    wrong = dataclasses.replace(refusing, loads=[dataclasses.replace(LOAD, after={"w": "x"})])
    assert judged(wrong, refused="no bias").failures


@pytest.mark.parametrize(
    ("answers", "models", "said"),
    [
        ([[1], [1]], 1, "different prompts get the same answer"),
        ([[1], [2], ("drafts", [])], 2, "the draft proposes nothing"),
        ([[1], [2], ("drafts", [[[3]], [[3]]])], 2, "the draft proposes nothing"),
        ([[1], [2], ("drafts", [[[3]], [[4]]])], 2, ""),
    ],
)
def test_answers_that_would_be_equal_anyway_prove_nothing(answers: list[object], models: int, said: str) -> None:
    row = Row("m", "all", "failed")
    run._check_meaning(dataclasses.replace(MODEL, models=models), answers, row)
    assert [said in failure for failure in row.failures] == ([True] if said else [])


def test_what_no_checkpoint_gives_a_value_is_held_against_the_seed() -> None:
    random = dataclasses.replace(LOAD, before={"w": "random", "b": "b"})
    shared = dataclasses.replace(MODEL, not_in_checkpoint=(("Llama", "w"),))
    assert judged(good(loads=[random]), what=shared, seed=random).failures == []
    final = dataclasses.replace(random, after={"w": "random"})
    assert judged(good(loads=[final]), what=shared, seed=random).failures, "in the end it must be the default load's"
    assert judged(good(loads=[random]), what=shared).failures == ["the fork did not load what the seed did"]


def test_with_the_runtime_layout_what_stood_before_post_processing_says_nothing() -> None:
    dummies = good(loads=[dataclasses.replace(LOAD, before={"w": "dummy"})])
    assert judged(dummies, layout="runtime").failures == []
    assert judged(dummies, layout="checkpoint").failures


def test_the_catalogue_covers_what_was_promised_and_lists_few_exceptions() -> None:
    names = [each.name for each in CATALOGUE]
    assert len(set(names)) == len(names)
    certain = [each for each in CATALOGUE if not (each.refused or each.cannot_run)]
    assert len(certain) >= 12
    assert [each.name for each in CATALOGUE if each.refused] == ["phi"]


def test_reasons_go_by_trait() -> None:
    assert case.listed({"cpu-without-amx": "why"}, frozenset({"cpu", "cpu-without-amx"})) == "why"
    assert case.listed({"cpu-without-amx": "why"}, frozenset({"cpu"})) is None
    assert case.listed({"any": "why"}, frozenset()) == "why"


def test_wider_models_keep_the_size_of_their_heads() -> None:
    (llama,) = [each for each in CATALOGUE if each.name == "llama"]
    wide = llama.scaled(4).settings
    assert wide["hidden_size"] // wide["num_attention_heads"] == 32
    assert wide["num_hidden_layers"] == llama.settings["num_hidden_layers"]
    assert llama.scaled(4).recipe() != llama.recipe()
    (mixed,) = [each for each in CATALOGUE if each.name == "llava"]
    assert mixed.scaled(2).settings["text_config"]["hidden_size"] == 256


def test_models_of_a_file_are_like_those_of_the_catalogue(tmp_path: Path) -> None:
    file = tmp_path / "models.json"
    file.write_text(json.dumps([{"name": "big", "like": "llama", "settings": {"hidden_size": 4096}, "ranks": 2}]))
    (big,) = case.from_file(file, CATALOGUE)
    assert (big.name, big.ranks, big.settings["hidden_size"], big.settings["vocab_size"]) == ("big", 2, 4096, 256)
    for wrong in ({"like": "no-such"}, {"like": "llama", "colour": 1}):
        file.write_text(json.dumps([wrong]))
        with pytest.raises(ValueError, match="none of"):
            case.from_file(file, CATALOGUE)


def test_the_shipped_file_of_large_models_can_be_read() -> None:
    models = case.from_file(Path(case.__file__).parent / "large.json", CATALOGUE)
    assert {model.ranks for model in models} == {1, 2}
    assert all(model.recipe() for model in models)


def test_a_table_replaces_that_of_its_platform_and_leaves_the_others(tmp_path: Path) -> None:
    facts = {"date": "2026-01-02", "device": "d", "vllm": "1", "torch": "2", "transformers": "3", "vllm_rfork": "4"}
    rows = [dataclasses.asdict(judged(good())), dataclasses.asdict(judged(good(answers=[[1, 3]])))]
    document = tmp_path / "zoo.md"
    for platform, shown in (("cpu", rows[:1]), ("cuda", rows), ("cpu", rows)):
        results.replace(document, results.Outcome({**facts, "platform": platform}, shown, 60.0))
    text = document.read_text()
    assert "2026-01-02" in text
    assert text.startswith("# The model zoo")
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## cpu", "## cuda"]
    assert text.count("**no**") == 2
    assert text.count("<!-- begin cpu -->") == text.count("<!-- end cpu -->") == 1


def test_runs_on_one_platform_can_be_shown_as_one(tmp_path: Path) -> None:
    one, two = (
        [dataclasses.asdict(Row(name, "", outcome)) for name in names]
        for names, outcome in (("ab", "failed"), ("bc", "forked"))
    )
    facts = {"date": "2026-01-02", "platform": "cuda", "vllm": "1"}
    for number, rows in enumerate((one, two)):
        outcome = results.Outcome({**facts, "date": f"2026-01-0{number}"}, rows, 60.0)
        (tmp_path / f"{number}.json").write_text(json.dumps(dataclasses.asdict(outcome)))
    both = results.merged([results.load(tmp_path / f"{number}.json") for number in (0, 1)])
    assert [(row["name"], row["outcome"]) for row in both.rows] == [("a", "failed"), ("b", "forked"), ("c", "forked")]
    assert both.seconds == 120.0
    with pytest.raises(ValueError, match="different platforms"):
        results.merged([both, dataclasses.replace(both, facts={**facts, "vllm": "2"})])


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The outcome of each model, by name; nothing is loaded."""
    found: dict[str, str] = {}
    facts = {"platform": "cpu", "date": "2026-01-02", "device": "d", "traits": [], "visible_devices_variable": "V"}
    facts |= dict.fromkeys(("vllm", "torch", "transformers", "vllm_rfork"), "1")

    @contextlib.contextmanager
    def platform(arguments: Any, threads: int) -> Iterator[tuple[dict[str, Any], Any]]:
        yield facts, SimpleNamespace(url="http://planner")

    def ran(case: Case, setting: run.Setting) -> Row:
        outcome = found[case.name]
        return Row(case.name, case.covers, outcome, "why", failures=["it differs"] if outcome == run.FAILED else [])

    monkeypatch.setattr(plugin, "platform", platform)
    monkeypatch.setattr(plugin, "run", ran)
    return found


@pytest.mark.parametrize(
    ("selected", "status", "shown"),
    [
        (["--only", "llama,phi,gemma3"], 0, 3),
        (["--only", "llama,qwen3"], 1, 2),
        (["-k", "llama", "--only", "llama,qwen3"], 0, 1),
        (["-k", "nothing"], 5, 0),
    ],
)
def test_the_command_runs_what_was_selected_and_writes_the_table(
    selected: list[str],
    status: int,
    shown: int,
    outcomes: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcomes |= {"llama": FORKED, "phi": REFUSED, "gemma3": run.NOT_RUN, "qwen3": run.FAILED}
    document = tmp_path / "zoo.md"
    monkeypatch.setattr("sys.argv", ["zoo", *selected, "--work", str(tmp_path), "--write", str(document)])
    assert command.main() == status
    assert document.exists() is bool(shown)
    if shown:
        assert len(results.load(tmp_path / "zoo.json").rows) == shown
    said = capsys.readouterr().out
    assert ("it differs" in said) is (status == 1)
    assert ("vLLM cannot load it here: why" in said) is ("gemma3" in selected[1])
