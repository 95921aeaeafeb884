"""The judgement of ``zoo.events``: what was seen passes only where it is what was expected, and nothing is left out."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zoo import events, plugin, scenarios
from zoo import scenario_results as sheets
from zoo.observe import Load
from zoo.scenario_results import CHECKS, FAILED, MORE_AT_REST, NOT_HERE, OK, NotHere, Outcome, Sheet, Wrong

LOAD = Load("Llama", {"w": "a"}, 1, 12, {"w": "c"}, {"scale": 1.0})
FORK = ("INFO", "RFork: forked 12 bytes (0.00 GB) in 0.2 s (1 GB/s) from seed 1:2:0, engine=nixl layout=runtime (x)")
FALL = ("WARNING", "RFork: falling back to load_format=auto: ForkError: pool (enable_sleep_mode)")
AWAY = ("WARNING", "RFork: this worker is not a seed: pool (enable_sleep_mode)")
FACTS = dict.fromkeys(("platform", "date", "device", "vllm", "torch", "transformers", "vllm_rfork"), "x")


def test_a_row_says_what_was_seen_and_what_became_of_it() -> None:
    sheet = Sheet()
    with sheet.check("seed") as seen:
        seen.append("it\nis there")
    with sheet.check("caches reset") as seen:
        seen.append("one")
        raise Wrong("two")
    with sheet.check("memory at rest"):
        raise NotHere("no such memory")
    with sheet.check("default load"):
        raise KeyError("answers")
    rows = {row.name: row for row in sheet.rows()}
    assert (rows["seed"].verdict, rows["seed"].seen) == (OK, "it is there")
    assert (rows["caches reset"].verdict, rows["caches reset"].seen) == (FAILED, "one; two")
    assert rows["memory at rest"].verdict == NOT_HERE
    assert (rows["default load"].verdict, rows["default load"].seen) == (FAILED, "KeyError: 'answers'")
    assert str(rows["seed"]) == f"seed | expected: {CHECKS['seed']} | seen: it is there | ok"


def test_what_was_not_reached_has_failed_and_a_row_stands() -> None:
    sheet = Sheet()
    sheet.put("seed", "there", OK)
    sheet.put("seed", "the scenario broke later", FAILED)
    rows = sheet.rows()
    assert [row.name for row in rows] == list(CHECKS)
    assert {row.verdict for row in rows if row.name != "seed"} == {FAILED}
    assert next(row for row in rows if row.name == "seed").verdict == OK
    assert Outcome({}, [dataclasses.asdict(row) for row in rows], 1.0).failed


def test_a_reader_gets_a_row_once_it_is_there_and_a_failed_one_where_none_comes() -> None:
    sheet = Sheet()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        seed, memory = pool.submit(sheet.wait, "seed"), pool.submit(sheet.wait, "memory at rest")
        sheet.put("seed", "there", OK)
        assert seed.result(60).verdict == OK
        assert not memory.done()
        sheet.close()
        assert (memory.result(60).verdict, memory.result().seen) == (FAILED, "not reached")


def test_a_name_that_no_list_has_is_an_error() -> None:
    with pytest.raises(KeyError):
        Sheet().put("sead", "there", OK)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([FALL], None),
        ([FORK, FALL], "it forked"),
        ([], "no 'falling back"),
        ([("WARNING", "RFork: falling back to load_format=auto: the engine is missing")], "none of"),
    ],
)
def test_a_refusal_counts_with_its_reason_and_without_a_fork(lines: sheets.Lines, said: str | None) -> None:
    if said is None:
        assert "pool" in sheets.refused(lines, "(enable_sleep_mode)")
        return
    with pytest.raises(Wrong, match=said):
        sheets.refused(lines, "(enable_sleep_mode)")


def test_not_being_a_seed_counts_with_its_reason() -> None:
    assert sheets.not_a_seed([AWAY], "(enable_sleep_mode)") == AWAY[1]
    for lines in ([], [("WARNING", "RFork: this worker is not a seed: rfork_become_seed is false")]):
        with pytest.raises(Wrong):
            sheets.not_a_seed(lines, "(enable_sleep_mode)")


def test_a_fork_counts_from_the_seed_that_was_meant() -> None:
    assert "layout runtime" in sheets.forked([FORK], "1:2:0")
    for lines, address in (([FORK], "1:3:0"), ([FALL], "1:2:0")):
        with pytest.raises(Wrong):
            sheets.forked(lines, address)


@pytest.mark.parametrize(
    ("loads", "answers", "said"),
    [
        ([dataclasses.replace(LOAD, after={"w": "d"})], [1], "w"),
        ([dataclasses.replace(LOAD, before={"w": "d"})], [1], "as loaded"),
        ([LOAD], [2], "answers"),
        ([LOAD, LOAD], [1], "2 models"),
        ([], [1], "0 models"),
    ],
)
def test_anything_unequal_is_said(loads: list[Load], answers: list[int], said: str) -> None:
    assert "1 answers equal" in sheets.equal(([LOAD], [1]), ([LOAD], [1]))
    with pytest.raises(Wrong, match=said):
        sheets.equal(([LOAD], [1]), (loads, answers))


def test_nothing_is_not_equal_to_nothing() -> None:
    for loads, answers in (([LOAD], []), ([], [1]), ([dataclasses.replace(LOAD, after={})], [1])):
        with pytest.raises(Wrong, match="nothing to compare"):
            sheets.equal((loads, answers), (loads, answers))


def test_in_the_runtime_layout_what_stood_there_before_says_nothing() -> None:
    dummies = dataclasses.replace(LOAD, before={"w": "dummy"})
    assert sheets.equal(([LOAD], [1]), ([dummies], [1]), sheets.layout_of([FORK]))


def test_a_withdrawn_seed_is_neither_granted_nor_vouched_for() -> None:
    gone = "seed http://h:1/rfork_epoch: GET failed: ClientConnectorError: Cannot connect to host h:1"
    assert sheets.withdrawn("", gone) == "no grant; nobody listens there any more"
    assert sheets.withdrawn("", "409 weights are updated").endswith("409 weights are updated")
    for granted, refusal in (("h:1:0", "409"), ("", "")):
        with pytest.raises(Wrong):
            sheets.withdrawn(granted, refusal)


def test_a_return_needs_another_epoch() -> None:
    assert sheets.returned("a", "b")
    for after in ("a", ""):
        with pytest.raises(Wrong):
            sheets.returned("a", after)


def test_memory_is_bounded_above_alone() -> None:
    assert "-5" in sheets.no_more("at rest", 10, 5, MORE_AT_REST)
    assert sheets.no_more("at rest", 10, 10 + MORE_AT_REST, MORE_AT_REST)
    with pytest.raises(Wrong, match="at rest"):
        sheets.no_more("at rest", 10, 11 + MORE_AT_REST, MORE_AT_REST)


def test_the_table_of_a_platform_takes_the_place_of_its_last_one(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n\ntext\n", encoding="utf-8")
    row = {"name": "seed", "expected": "a | b", "seen": "1", "verdict": OK}
    sheets.replace(page, Outcome(FACTS, [row], 1.0))
    sheets.replace(page, Outcome({**FACTS, "platform": "y"}, [{**row, "seen": "2"}], 1.0))
    sheets.replace(page, Outcome(FACTS, [{**row, "verdict": FAILED}], 1.0))
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Page\n\ntext\n\n## Events\n")
    assert text.count("## Events\n") == 1
    assert "| seed | a \\| b | 1 | **FAILED** |" in text
    assert "| 1 | ok |" not in text
    assert "| seed | a \\| b | 2 | ok |" in text
    assert "1 FAILED" in text


def test_every_check_has_its_scenario() -> None:
    """A check that no scenario makes would be reported as not reached for ever."""
    code = (Path(sheets.__file__).parent / "scenarios.py").read_text(encoding="utf-8")
    groups = ("sleep mode: ", "expandable segments", "weight update: ", "sleep of a seed: ", "reload: ")
    for name in CHECKS:
        group = next((group for group in groups if name.startswith(group)), "")
        assert f'"{name}"' in code or (group and group.removesuffix(": ") in code), name


@pytest.mark.parametrize(
    ("verdicts", "status", "shown"),
    [
        (dict.fromkeys(CHECKS, OK), 0, "34 passed"),
        ({**dict.fromkeys(CHECKS, OK), "memory at rest": NOT_HERE}, 0, "33 passed, 1 skipped"),
        ({**dict.fromkeys(CHECKS, OK), "memory at rest": FAILED}, 1, "1 failed, 33 passed"),
        ({"default load": OK}, 1, "33 failed, 1 passed"),
    ],
)
def test_the_command_reports_every_check_and_writes_the_table(
    verdicts: dict[str, str],
    status: int,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With scenarios that are made up; the last one ends with an error, and its checks are not reached."""

    @contextlib.contextmanager
    def platform(arguments: Any, threads: int) -> Iterator[tuple[dict[str, Any], Any]]:
        yield FACTS, SimpleNamespace()

    def made(arguments: Any, sheet: Sheet, *more: Any) -> Any:
        return SimpleNamespace(sheet=sheet, default=SimpleNamespace(answers=[1]))

    def scenario(stage: Any) -> None:
        for name, verdict in verdicts.items():
            stage.sheet.put(name, "seen", verdict)
        raise RuntimeError("the scenario broke")

    monkeypatch.setattr(plugin, "platform", platform)
    monkeypatch.setattr(plugin, "made", made)
    monkeypatch.setattr(scenarios, "default_load", lambda stage: None)
    monkeypatch.setattr(scenarios, "SCENARIOS", [scenario])
    page = tmp_path / "zoo.md"
    monkeypatch.setattr("sys.argv", ["zoo.events", "--work", str(tmp_path), "--write", str(page)])
    assert events.main() == status
    assert f" {shown}" in capsys.readouterr().out
    assert page.read_text().count("| **FAILED** |") == sum(verdicts.get(name, FAILED) == FAILED for name in CHECKS)
    assert len(sheets.load(tmp_path / "events.json").rows) == len(CHECKS)
