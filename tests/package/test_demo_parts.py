"""The demo's judgement: it must fail whenever something is not as it promises, and only then."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from demo import __main__ as story
from demo import elapsed, milestones, servers
from demo.asking import ANSWER_TOKENS, Answer, sha256
from demo.milestones import Weights
from demo.processes import DemoError, Process, wait_until
from demo.verdict import ServerResult, are_identical, complaints, report, why_forks_are_slower

A_SEED, B_SEED, C_SEED, D_SEED = (f"127.0.0.1:{port}:0" for port in (9001, 9002, 9003, 9004))


def answers(salt: int = 0) -> tuple[Answer, ...]:
    """Two answers that depend on ``salt`` as a model's depend on its weights."""
    return tuple(
        Answer(
            prompt,
            f"text {salt} {index}",
            tuple(range(salt + 100 * index, salt + 100 * index + ANSWER_TOKENS)),
            tuple(-1.0 / (salt + index + token + 3) for token in range(ANSWER_TOKENS)),
        )
        for index, prompt in enumerate(("one", "two"))
    )


def four() -> list[ServerResult]:
    """The demo as it should go."""
    return [
        ServerResult("A", Weights("storage", None, 1000, 0.5), A_SEED, answers()),
        ServerResult("B", Weights("fork", A_SEED, 1000, 0.1), B_SEED, answers()),
        ServerResult("C", Weights("fork", B_SEED, 1000, 0.1), C_SEED, answers()),
        ServerResult("D", Weights("storage", None, 1000, 0.5), D_SEED, answers()),
    ]


def with_weights(results: list[ServerResult], index: int, weights: Weights) -> None:
    results[index] = dataclasses.replace(results[index], weights=weights)


def with_answer(results: list[ServerResult], index: int, **changes: Any) -> None:
    first, *rest = results[index].answers
    results[index] = dataclasses.replace(results[index], answers=(dataclasses.replace(first, **changes), *rest))


def test_a_demo_that_goes_as_promised_has_nothing_to_complain_of() -> None:
    assert complaints(four(), answers(salt=7)) == []


@pytest.mark.parametrize("index", [1, 2, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"text": "something else"},
        {"token_ids": (*range(ANSWER_TOKENS - 1), 9999)},
        {"logprobs": (*(-1.0 / (token + 3) for token in range(ANSWER_TOKENS - 1)), -0.25)},
    ],
)
def test_one_server_that_answers_otherwise_is_named(index: int, changes: dict[str, Any]) -> None:
    results = four()
    with_answer(results, index, **changes)
    assert not are_identical(results)
    expected = f"{results[index].name} and A answer 'one' differently"
    assert any(expected in text for text in complaints(results, answers(7)))


def test_a_logprob_that_differs_in_its_last_bit_is_a_difference() -> None:
    results = four()
    logprobs = results[2].answers[0].logprobs
    nudged = (logprobs[0] * (1 + 2**-52), *logprobs[1:])
    assert nudged != logprobs
    with_answer(results, 2, logprobs=nudged)
    assert not are_identical(results)
    assert complaints(results, answers(7))
    assert sha256(results[2].answers) != sha256(results[0].answers)


@pytest.mark.parametrize(
    ("index", "weights"),
    [
        (0, Weights("fork", B_SEED, 1000, 0.1)),
        (1, Weights("storage", None, 1000, 0.5)),
        (2, Weights("storage", None, 1000, 0.5)),
        (3, Weights("fork", C_SEED, 1000, 0.1)),
    ],
)
def test_weights_from_elsewhere_are_wrong(index: int, weights: Weights) -> None:
    results = four()
    with_weights(results, index, weights)
    assert any(text.startswith("the sources are") for text in complaints(results, answers(7)))


def test_a_fork_from_another_seed_than_the_story_tells_is_wrong() -> None:
    results = four()
    with_weights(results, 2, Weights("fork", A_SEED, 1000, 0.1))
    assert complaints(results, answers(7)) == [f"C forked from {A_SEED}, and B is {B_SEED}"]


@pytest.mark.parametrize("nbytes", [0, 999])
def test_a_server_with_another_number_of_bytes_is_wrong(nbytes: int) -> None:
    results = four()
    with_weights(results, 1, Weights("fork", A_SEED, nbytes, 0.1))
    assert any("bytes of weights" in text for text in complaints(results, answers(7)))


def test_other_weights_that_answer_alike_prove_that_the_comparison_is_blind() -> None:
    assert len(complaints(four(), answers())) == len(answers())
    half = (answers()[0], answers(salt=7)[1])
    assert len(complaints(four(), half)) == 1


def all_four(change: Callable[[tuple[Answer, ...]], tuple[Answer, ...]]) -> list[ServerResult]:
    return [dataclasses.replace(result, answers=change(result.answers)) for result in four()]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda told: tuple(dataclasses.replace(one, text=" ") for one in told), "an empty answer"),
        (lambda told: tuple(dataclasses.replace(one, token_ids=()) for one in told), "with 0 tokens"),
        (lambda told: tuple(dataclasses.replace(told[0], prompt=one.prompt) for one in told), "to different prompts"),
        (lambda told: (told[0], told[0]), "received no two different prompts"),
    ],
)
def test_answers_that_could_not_tell_two_models_apart_are_refused(
    change: Callable[[tuple[Answer, ...]], tuple[Answer, ...]], complaint: str
) -> None:
    results = all_four(change)
    assert are_identical(results)
    assert any(complaint in text for text in complaints(results, answers(7)))


def test_the_report_has_the_published_fields_and_no_others() -> None:
    document = json.loads(json.dumps(report("nixl", four())))
    assert list(document) == ["engine", "identical", "servers"]
    assert document["identical"] is True
    assert [list(entry) for entry in document["servers"]] == [
        ["name", "source", "seed", "nbytes", "weights_s", "answers_sha256"]
    ] * 4
    assert [(entry["name"], entry["source"], entry["seed"]) for entry in document["servers"]] == [
        ("A", "storage", None),
        ("B", "fork", A_SEED),
        ("C", "fork", B_SEED),
        ("D", "storage", None),
    ]
    assert len({entry["answers_sha256"] for entry in document["servers"]}) == 1


@pytest.mark.parametrize(
    ("fork_s", "explained"),
    [(0.1, False), (0.5, False), (0.51, True)],
)
def test_the_table_is_explained_if_a_fork_is_slower_than_storage(
    fork_s: float, explained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = four()
    with_weights(results, 2, Weights("fork", B_SEED, 1000, fork_s))
    monkeypatch.setattr(story, "play", lambda engine: (results, answers(salt=7)))
    monkeypatch.setattr(story, "RESULT", tmp_path / "demo.json")
    monkeypatch.setattr(story, "ROOT", tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    outcome = CliRunner().invoke(story.main, [])
    assert outcome.exit_code == 0
    assert ("page cache" in outcome.output) is explained
    assert len((why_forks_are_slower(results) or "").split(". ")) == 1, "one sentence"


def test_nothing_is_explained_where_nothing_was_compared() -> None:
    assert why_forks_are_slower([ServerResult("A", Weights("storage", None, 1000, 0.5), A_SEED, answers())]) is None
    assert why_forks_are_slower([ServerResult("B", Weights("fork", A_SEED, 1000, 0.5), B_SEED, answers())]) is None


def test_the_elapsed_time_is_shown_while_a_step_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(elapsed, "PIPE_S", 0.01)
    shown = ""
    with elapsed.elapsed("A starts"):
        while "so far\n" not in shown:
            shown += capsys.readouterr().out
    assert re.fullmatch(r"   A starts: \d+ s so far", shown.splitlines()[0])
    capsys.readouterr()
    with elapsed.elapsed("quick"):
        pass
    assert capsys.readouterr().out == ""


Played = tuple[list[ServerResult], Sequence[Answer]]


@pytest.mark.parametrize(
    ("played", "code"),
    [
        ((four(), answers(salt=7)), 0),
        ((four(), answers()), 1),
        ((list(reversed(four())), answers(salt=7)), 1),
        (DemoError("server B ended with 1"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_the_exit_code_tells(
    played: Played | BaseException, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "demo.json"
    result.write_text("of an earlier run")

    def play(engine: str) -> Played:
        assert engine == "nixl"
        if isinstance(played, BaseException):
            raise played
        return played

    monkeypatch.setattr(story, "play", play)
    monkeypatch.setattr(story, "RESULT", result)
    monkeypatch.setattr(story, "ROOT", tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        outcome = CliRunner().invoke(story.main, [])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert outcome.exit_code == code, outcome.output
    assert result.exists() == (code in (0, 1)), "a demo that did not run leaves no result behind, not even an old one"


FORKED = (
    "(EngineCore pid=12) INFO 11-22 16:24:18 [loader.py:10] RFork: forked 397410304 bytes (0.40 GB) in 0.114 s"
    " (3.49 GB/s) from seed 127.0.0.1:40001:0 over nixl\n"
)
LOADED = (
    "(EngineCore pid=12) INFO 11-22 16:24:18 [loader.py:10] RFork: loaded 397410304 bytes (0.40 GB) from storage in"
    " 1.250 s (0.32 GB/s), load_format=auto\n"
)
ANNOUNCED = "(EngineCore pid=12) INFO 11-22 16:24:18 [loader.py:10] RFork: seed 127.0.0.1:40002:0 announced, key a$b\n"


def test_milestone_lines_are_read() -> None:
    noise = "INFO RFork: forking 5 bytes\n"
    assert milestones.weights(noise + FORKED + ANNOUNCED) == Weights("fork", "127.0.0.1:40001:0", 397410304, 0.114)
    assert milestones.weights(LOADED + ANNOUNCED) == Weights("storage", None, 397410304, 1.25)
    assert milestones.announced(LOADED) is None
    assert milestones.announced(LOADED + ANNOUNCED) == "127.0.0.1:40002:0"


@pytest.mark.parametrize("log", ["", "INFO nothing of the kind\n", FORKED + LOADED])
def test_a_log_that_does_not_say_where_the_weights_came_from_is_an_error(log: str) -> None:
    with pytest.raises(DemoError, match="lines that say where the weights came from"):
        milestones.weights(log)


def test_two_servers_side_by_side_get_as_many_cores_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for own in ({3}, {0, 1}, {0, 1, 2}, set(range(40))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, own=own: own)
        first, second = (set(servers.cores(slot).split(",")) for slot in (0, 1))
        assert len(first) == len(second) <= 8
        assert {int(core) for core in first | second} <= own
        assert len(own) == 1 or not first & second


def in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_the_whole_tree_of_a_process_ends_with_it(tmp_path: Path) -> None:
    child = "import time; print('child', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(600)"
    with Process("parent", [sys.executable, "-c", parent], os.environ, tmp_path / "log") as process:
        process.wait_until("starting a child", lambda: "child" in process.text(), deadline_s=60)
        group = process._popen.pid
        process.kill()
    assert [one for one in psutil.process_iter(["status"]) if in_group(one, group)] == []


def test_a_process_that_ends_early_is_noticed_and_its_words_are_shown(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such model')"]
    with (
        Process("server B", command, os.environ, tmp_path / "log") as process,
        pytest.raises(DemoError, match=r"(?s)server B ended with 1.*no such model"),
    ):
        process.wait_until("becoming ready", lambda: False, deadline_s=60)


def test_waiting_is_bounded() -> None:
    with pytest.raises(DemoError, match="the moon did not happen within 0 s"):
        wait_until("the moon", lambda: False, deadline_s=0)
