"""``vllm-rfork selftest`` says by its exit status whether the bytes were right, and always comes back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from vllm_rfork.cli.main import main
from vllm_rfork.selftest import connecting, offer
from vllm_rfork.selftest.attempts import Attempt, Outcome, in_order
from vllm_rfork.selftest.report import CODES, FAILED, GOOD, TOO_LATE, WRONG_BYTES, report
from vllm_rfork.selftest.roles import FRESH, Result, Trial, buffer_sizes

ROOT = Path(__file__).resolve().parents[2]
#: In each child of the self-test: the memory engine's read notes its process, and then hangs or kills it.
HANGS_OR_DIES = """
import os, signal, sys
if "--multiprocessing-fork" in sys.argv:
    from vllm_rfork.engines import memory
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with open(os.environ["PIDS"], "a") as pids:
        print(os.getpid(), file=pids)
    def read(*arguments, **more):
        if os.environ["ENDS"] == "dies":
            os.write(2, b"many words\\n" * 1000 + b"the last words of a native library\\n")
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            signal.pause()
    memory.MemoryEngine.read = read
"""


def selftest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_rfork.cli.main", "selftest", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("engine", ["memory", "nixl"])
def test_right_bytes_are_exit_0_with_a_speed(engine: str) -> None:
    done = selftest("--engine", engine, "--size", "8M")
    assert done.returncode == GOOD, done.stderr
    assert "every digest is right" in done.stdout
    assert "GB/s" in done.stdout
    assert str(8 << 20) in done.stdout


@pytest.mark.parametrize(("engine", "hint"), [("nixl", "UCX_NET_DEVICES"), ("memory", "no network")])
def test_a_host_that_the_engine_would_ignore_is_refused(engine: str, hint: str) -> None:
    """It passed, and said nothing about the address that it was asked to test."""
    done = selftest("--engine", engine, "--size", "1M", "--host", "10.9.9.9")
    assert done.returncode == 2
    assert "--host has no effect" in done.stderr
    assert hint in done.stderr


@pytest.mark.parametrize("engine", ["memory", pytest.param("nixl", marks=pytest.mark.long)])
def test_an_altered_seed_is_exit_1(engine: str) -> None:
    """One bit of one byte, after the digest was taken."""
    done = selftest("--engine", engine, "--size", "8M", "--corrupt")
    assert done.returncode == WRONG_BYTES, done.stderr
    assert "1 of" in done.stderr


@pytest.mark.parametrize("fault", ["flip_byte=12345", "truncate_read=1"])
def test_bytes_damaged_on_the_way_are_exit_1(fault: str) -> None:
    done = selftest("--engine", "memory", "--size", "1M", RFORK_MEMORY_FAULT=fault)
    assert done.returncode == WRONG_BYTES, done.stderr


@pytest.mark.parametrize(
    "fault",
    [
        "open_fails",
        pytest.param("register_fails", marks=pytest.mark.long),
        pytest.param("connect_fails", marks=pytest.mark.long),
        "fail_read=1",
    ],
)
def test_an_engine_that_fails_is_exit_3_and_named(fault: str) -> None:
    done = selftest("--engine", "memory", "--size", "1M", RFORK_MEMORY_FAULT=fault)
    assert done.returncode == FAILED
    assert f"{fault.partition('=')[0].replace('fail_read', 'read').replace('_fails', '')} failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_hangs_is_exit_4_in_time() -> None:
    began = time.monotonic()
    done = selftest("--engine", "memory", "--size", "1M", "--timeout", "3", RFORK_MEMORY_FAULT="stall_read=1")
    assert done.returncode == TOO_LATE, done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("ends", ["hangs", "dies"])
def test_no_child_outlives_the_command(ends: str, tmp_path: Path) -> None:
    """A hanging native library ignores every signal but SIGKILL, and a dead child has no message."""
    pids = tmp_path / "pids"
    (tmp_path / "sitecustomize.py").write_text(HANGS_OR_DIES)
    began = time.monotonic()
    path = f"{tmp_path}:{ROOT}"
    arguments = ("--engine", "memory", "--size", "1M", "--timeout", "5")
    done = selftest(*arguments, PYTHONPATH=path, PIDS=str(pids), ENDS=ends)
    assert time.monotonic() - began < 90
    if ends == "hangs":
        assert done.returncode == TOO_LATE, done.stderr
    else:
        assert (done.returncode, "ended with status -9" in done.stderr) == (FAILED, True), done.stderr
        assert "the last words of a native library" in done.stderr
        assert done.stderr.count("many words") < 10
    written = [int(line) for line in pids.read_text().split()]
    assert len(written) == 2
    for pid in written:
        assert not Path(f"/proc/{pid}").exists()


def test_a_missing_package_is_said_with_how_to_install_it(tmp_path: Path) -> None:
    for name in ("nixl", "nixl_cu12", "nixl_cu13"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('gone', name='{name}')\n")
    done = selftest("--engine", "nixl", "--size", "1M", PYTHONPATH=str(tmp_path))
    assert done.returncode == FAILED
    assert "pip install 'vllm-rfork[nixl]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", ["0", "-1", "12x", "", "1.5G"])
def test_a_size_that_is_none_is_a_usage_error(size: str) -> None:
    done = CliRunner().invoke(main, ["selftest", "--engine", "memory", "--size", size])
    assert done.exit_code == 2, done.output
    assert "Invalid value for '--size'" in done.output


def test_the_first_engine_that_works_ends_the_search() -> None:
    done = selftest("--engine", "yuanrong,memory,nixl", "--size", "1M", LD_LIBRARY_PATH="")
    assert done.returncode == GOOD, done.stderr
    assert "lane memory" in done.stdout
    assert re.search(r"preferred, but not possible:\n  yuanrong: .*set_env\.sh", done.stdout)
    assert "nixl/" not in done.stdout


def attempts(*outcomes: Outcome) -> tuple[list[Trial], Callable[[Trial, float], Attempt], list[float]]:
    """Trials, and the attempts that end with ``outcomes``; the shares of time that they got."""
    shares: list[float] = []

    def attempt(trial: Trial, deadline: float) -> Attempt:
        shares.append(deadline - time.monotonic())
        outcome = outcomes[int(trial.engine)]
        if outcome not in ("right", "wrong"):
            return Attempt(trial.engine, outcome, "why")
        wrong = [0] if outcome == "wrong" else []
        return Attempt(trial.engine, outcome, result=Result("e/lane", wrong, 1, 100, {FRESH: 1.0}))

    return [Trial(str(number)) for number in range(len(outcomes))], attempt, shares


def test_an_engine_that_hangs_leaves_time_for_the_next() -> None:
    trials, attempt, shares = attempts("late", "refused", "right")
    ended = in_order(trials, 100.0, attempt, every=False)
    assert [each.outcome for each in ended] == ["late", "refused", "right"]
    assert [round(share) for share in shares] == [50, 50, 100], "no time passes here"


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["right"], GOOD),
        (["refused", "right"], GOOD),
        (["refused", "refused"], FAILED),
        (["broke", "right"], FAILED),
        (["late", "right"], TOO_LATE),
        (["late", "broke", "right"], FAILED),
        (["right", "wrong"], WRONG_BYTES),
        (["wrong", "broke"], WRONG_BYTES),
    ],
)
def test_a_lane_that_is_refused_is_no_failure_beside_one_that_works(outcomes: list[Outcome], code: int) -> None:
    trials, attempt, _ = attempts(*outcomes)
    made = report("title", in_order(trials, 100.0, attempt, every=True))
    assert made.code == code
    text = "\n".join(made.lines)
    assert text.count("FAILED: ") == sum(each not in ("right", "refused") for each in outcomes)


def test_lanes_that_work_are_compared() -> None:
    for outcomes, compared in ((["right", "right"], True), (["right", "wrong"], False)):
        trials, attempt, _ = attempts(*outcomes)  # type: ignore[arg-type]
        made = report("title", in_order(trials, 100.0, attempt, every=True))
        assert ("fastest first read: e/lane" in made.lines) == compared


def test_the_exit_statuses_do_not_collide() -> None:
    assert len(CODES) == 4
    assert 2 not in CODES, "2 is wrong usage"


@given(st.integers(min_value=1, max_value=3 << 30))
def test_buffer_sizes_add_up(nbytes: int) -> None:
    sizes = buffer_sizes(nbytes)
    assert sum(sizes) == nbytes
    assert min(sizes) > 0


def test_a_serving_host_controls_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "\x1b]0;owned\x07\nFAKE LINE"
    made = offer.Offer(offer.VERSION, "c", "cpu" + evil, offer.Host("", None), [offer.Seed("memory", reason=evil)])

    async def fetch(*_: Any) -> offer.Offer:
        return made

    async def tell(*_: Any) -> None: ...

    monkeypatch.setattr(connecting, "SeedHttp", lambda *_: None)
    monkeypatch.setattr(connecting, "_fetch", fetch)
    monkeypatch.setattr(connecting, "_tell", tell)
    report = connecting.connect("h:1", Trial("memory"), ["memory"], SimpleNamespace(), setting="memory")  # type: ignore[arg-type]
    assert all(line.isprintable() for line in report.lines), report.lines
