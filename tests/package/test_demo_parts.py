"""The demo's judgement: it must fail whenever something is not as it promises, and only then."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest
from click.testing import CliRunner
from rich.console import Console

from demo import __main__ as command
from demo import elapsed, milestones, servers, throttle
from demo.asking import ANSWER_TOKENS, Answer, sha256
from demo.milestones import Weights
from demo.processes import DemoError, Process, wait_until
from demo.screen import Screen
from demo.story import Story
from demo.verdict import ServerResult, are_identical, complaints, explanation, report

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
        ServerResult("A", Weights("storage", None, 10**8, 0.8, throttle.FORMAT), A_SEED, answers(), 125),
        ServerResult("B", Weights("fork", A_SEED, 10**8, 0.1), B_SEED, answers()),
        ServerResult("C", Weights("fork", B_SEED, 10**8, 0.2), C_SEED, answers()),
        ServerResult("D", Weights("storage", None, 10**8, 0.1, "auto"), D_SEED, answers()),
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
        (0, Weights("fork", B_SEED, 10**8, 0.2)),
        (1, Weights("storage", None, 10**8, 0.5)),
        (2, Weights("storage", None, 10**8, 0.5)),
        (3, Weights("fork", C_SEED, 10**8, 0.1)),
    ],
)
def test_weights_from_elsewhere_are_wrong(index: int, weights: Weights) -> None:
    results = four()
    with_weights(results, index, weights)
    assert any(text.startswith("the sources are") for text in complaints(results, answers(7)))


def test_a_fork_from_another_seed_than_the_story_tells_is_wrong() -> None:
    results = four()
    with_weights(results, 2, Weights("fork", A_SEED, 10**8, 0.1))
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
        ["name", "source", "seed", "nbytes", "weights_s", "throttled_mb_per_s", "answers_sha256"]
    ] * 4
    assert [entry["throttled_mb_per_s"] for entry in document["servers"]] == [125, None, None, None]
    assert [(entry["name"], entry["source"], entry["seed"]) for entry in document["servers"]] == [
        ("A", "storage", None),
        ("B", "fork", A_SEED),
        ("C", "fork", B_SEED),
        ("D", "storage", None),
    ]
    assert len({entry["answers_sha256"] for entry in document["servers"]}) == 1


@pytest.mark.parametrize(
    "weights",
    [
        Weights("storage", None, 10**8, 0.7, throttle.FORMAT),  # 125 MB/s take 0.8 s
        Weights("storage", None, 10**8, 0.8, "auto"),
    ],
)
def test_storage_that_was_not_throttled_as_labelled_is_wrong(weights: Weights) -> None:
    results = four()
    with_weights(results, 0, weights)
    (complaint,) = complaints(results, answers(7))
    assert complaint.startswith("A read storage in ")
    assert "125 MB/s" in complaint


def test_throttled_tensors_come_no_sooner_than_their_rate() -> None:
    class Tensor:
        nbytes = 50 * 10**6

    now = [100.0]
    came = []
    tensors = ((str(index), Tensor()) for index in range(3))
    for name, _tensor in throttle.throttled(
        tensors, 125, clock=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    ):
        came.append((name, round(now[0] - 100, 6)))
        now[0] += 0.1  # copying counts as time that the read took
    assert came == [("0", 0.4), ("1", 0.8), ("2", 1.2)]


def test_a_source_that_is_slower_than_the_rate_is_not_delayed() -> None:
    class Tensor:
        nbytes = 10**6

    slept: list[float] = []
    now = iter([0.0, 5.0])
    assert len(list(throttle.throttled([("a", Tensor())], 125, clock=lambda: next(now), sleep=slept.append))) == 1
    assert slept == [0.0]


def test_the_throttled_server_alone_has_another_loader() -> None:
    plain, throttled = (servers.rfork_options("http://planner", "nixl", rate) for rate in (None, 125))
    assert throttle.FORMAT not in plain[-1]
    assert json.loads(throttled[-1]) == json.loads(plain[-1]) | {
        "rfork_fallback_load_format": throttle.FORMAT,
        throttle.RATE: 125,
    }


def test_the_table_is_explained_in_one_sentence_by_its_own_figures() -> None:
    sentence = explanation(four()) or ""
    assert len(sentence.split(". ")) == 1
    assert "at most 0.20 s: 4.0 times as fast as storage that delivers 125 MB/s" in sentence
    assert "0.5 times as fast as this machine's page cache" in sentence


@pytest.mark.parametrize("index", [1, 3])
def test_nothing_is_explained_where_the_sources_are_others(index: int) -> None:
    results = four()
    with_weights(results, index, Weights("storage", None, 10**8, 0.5) if index == 1 else results[1].weights)
    assert explanation(results) is None


class Output(io.StringIO):
    """A file that is a terminal or is not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_the_elapsed_time_is_a_line_from_time_to_time_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elapsed, "PIPE_S", 0.01)
    pipe = Output(terminal=False)
    with elapsed.elapsed("A starts", Console(file=pipe)):
        wait_until("a line", lambda: "so far\n" in pipe.getvalue(), deadline_s=60)
    assert re.fullmatch(r"   A starts: \d+ s so far", pipe.getvalue().splitlines()[0])
    quick = Output(terminal=False)
    with elapsed.elapsed("quick", Console(file=quick)):
        pass
    assert quick.getvalue() == ""


def test_the_elapsed_time_is_a_spinner_on_a_terminal_alone() -> None:
    terminal = Output(terminal=True)
    with elapsed.elapsed("A starts", Console(file=terminal, force_terminal=True, _environ={"TERM": "xterm"})):
        wait_until("the spinner", lambda: "A starts" in terminal.getvalue(), deadline_s=60)
    assert "0:00:0" in terminal.getvalue()
    assert terminal.getvalue().rstrip("\n").endswith("\x1b[2K"), "the line is cleared"
    coloured = Output(terminal=False)
    with elapsed.elapsed("A starts", Console(file=coloured, force_terminal=True)):
        pass
    assert coloured.getvalue() == "", "FORCE_COLOR makes no terminal of a pipe"


def test_the_picture_has_what_was_printed_and_loads_nothing(tmp_path: Path) -> None:
    screen = Screen()
    screen.console.file = io.StringIO()
    screen.say("[bold]A[/bold]: " + "vllm serve " * 20)
    screen.show(command.table(four()))
    screen.save(tmp_path / "assets" / "demo.svg", title="make demo")
    root = ElementTree.parse(tmp_path / "assets" / "demo.svg").getroot()
    text = " ".join("".join(root.itertext()).split())
    assert "make demo" in text
    assert text.count("vllm") == 20, "long lines are broken, not cut"
    assert "storage throttled to 125 MB/s" in text.replace("\xa0", " ")
    assert not re.search(r"url\(\W*http|(?:src|href)=", (tmp_path / "assets" / "demo.svg").read_text())


def test_the_table_has_a_line_for_each_server_in_80_columns() -> None:
    pipe = Output(terminal=False)
    Console(file=pipe, width=80).print(command.table(four()))
    assert len(re.findall(r"^. [A-D] .*(?:-|equal) +.$", pipe.getvalue(), re.MULTILINE)) == 4
    assert "storage throttled to 125 MB/s" in pipe.getvalue()


def test_the_recording_in_the_docs_is_of_a_run_that_went_as_promised() -> None:
    root = ElementTree.parse(servers.ROOT / "docs" / "assets" / "demo.svg").getroot()
    text = " ".join("".join(root.itertext()).split())
    assert [text.count(f"{name}: vllm serve") for name in "ABCD"] == [1] * 4
    assert text.count("fork from") == 2
    assert f"storage throttled to {throttle.DEFAULT_RATE} MB/s" in text
    assert "A fork took at most" in text
    assert "All four answers are equal, to the last bit" in text
    assert "WRONG" not in text


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

    def play(story: Story) -> Played:
        assert vars(story)["_engine"] == "nixl"
        if isinstance(played, BaseException):
            raise played
        return played

    monkeypatch.setattr(Story, "play", play)
    monkeypatch.setattr(command, "RESULT", result)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        outcome = CliRunner().invoke(command.main, [])
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
    assert milestones.weights(LOADED + ANNOUNCED) == Weights("storage", None, 397410304, 1.25, "auto")
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
