"""The benchmark of starts: numbers from logs, medians and targets; the starts themselves are in tests/vllm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bench import start_up
from bench.start_up import ROWS, medians, table, targets
from bench.start_up_process import Start, read_numbers

LOG = """
MARK imported 17.3
INFO [default_loader.py:391] Loading weights took 2.73 seconds
INFO [gpu_model_runner.py:5105] Model loading took 14.19 GiB memory and 5.46 seconds
INFO [backends.py:1090] Directly load the compiled graph(s) for compile range (1, 8192) from the cache, took 0.9 s
INFO [monitor.py:53] torch.compile and initial profiling/warmup run together took 12.83 s in total
INFO [core.py:302] init engine (profile, create kv cache, warmup model) took 12.80 s (compilation: 3.20 s)
MARK engine 45.1
MARK first_token 46.5
MARK tokens [123, 445, 30]
"""
FORKED = LOG.replace(
    "INFO [default_loader.py:391] Loading weights took 2.73 seconds",
    "INFO RFork[0]: forked 15231233024 bytes (15.23 GB) in 0.24 s (63.46 GB/s) from seed 127.0.0.1:4711:0",
)


@pytest.mark.parametrize(("log", "weights_s"), [(LOG, 2.73), (FORKED, 0.24)])
def test_numbers_are_read_from_a_log(log: str, weights_s: float) -> None:
    found = read_numbers(log)
    assert {name: found[name] for name in ("imported_s", "engine_s", "first_token_s")} == {
        **{"imported_s": 17.3, "engine_s": 45.1, "first_token_s": 46.5}
    }
    assert found["after_imports_s"] == 29.2
    assert (found["weights_s"], found["model_loading_s"], found["init_engine_s"]) == (weights_s, 5.46, 12.8)
    assert (found["graphs_loaded"], found["aot_loaded"], found["tokens"]) == (True, False, "[123, 445, 30]")
    assert any("forked" in line for line in found["lines"]) == (log is FORKED)


def test_a_start_without_an_answer_counts_in_no_median() -> None:
    runs = [{"row": "first", **read_numbers(LOG.replace("46.5", text))} for text in ("41.0", "43.0", "48.0")]
    runs += [{"row": "first", **read_numbers("MARK imported 900.0\n")}, {"row": "fork-off", "skipped": "no time"}]
    assert medians(runs).keys() == {"first"}
    assert (medians(runs)["first"]["first_token_s"], medians(runs)["first"]["runs"]) == (43.0, 3)


def test_targets_are_a_warm_start_without_weights_and_half_a_cold_one() -> None:
    rows = {
        "default-cold": {"first_token_s": 104.6, "weights_s": 3.48},
        "default-warm": {"first_token_s": 46.5, "weights_s": 2.73},
        "fork-code": {"first_token_s": 45.0},
        "fork-code-path": {"first_token_s": 46.2},
    }
    assert targets(rows) == {
        "warm_without_weights_s": 45.96,
        "half_of_cold_s": 52.3,
        "fork-code": True,
        "fork-code-path": False,
    }
    assert targets({}) == {}


def test_every_row_is_in_the_table() -> None:
    rows = medians([{"row": name, **read_numbers(LOG)} for name in ROWS])
    assert table(rows).row_count == len(ROWS)


class FakeStart(Start):
    """A start that answers at once. Each is in ``started`` as row, folder of the model, cache root, GPU and caches."""

    started: ClassVar[list[tuple[str, str, str, str, str]]] = []
    log_text = LOG

    def __init__(self, log: Path, model: Path, llm: Mapping[str, Any], env: Mapping[str, str], *, guard: bool) -> None:
        self.log = log
        log.write_text(self.log_text)
        extra = llm.get("model_loader_extra_config", {})
        gpu, caches = env["CUDA_VISIBLE_DEVICES"], extra.get("rfork_caches", "default")
        self.started.append((log.stem[3:], model.name, Path(env["HOME"]).name, gpu, caches))

    def wait(self, limit_s: float) -> bool:
        return "MARK tokens" in self.text()

    def wait_for_offer(self, limit_s: float) -> bool:
        return True

    def end(self, grace_s: float) -> None:
        pass


class FakeFleet:
    token = "t"

    def __init__(self, folder: Path) -> None:
        pass

    def options(self, model_url: str, caches: str, engine: str) -> dict[str, Any]:
        return {"rfork_caches": caches}

    def stop(self) -> None:
        pass


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(start_up, "Start", FakeStart)
    monkeypatch.setattr(start_up, "Fleet", FakeFleet)
    monkeypatch.setattr(FakeStart, "started", [])
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        out = tmp_path / "out.json"
        status = start_up.main(["--model", str(tmp_path / "m"), "--out", str(out), *arguments])
        return status, json.loads(out.read_text())

    return run


def test_the_seed_has_a_gpu_of_its_own_and_the_root_of_the_warm_rows(run: Any) -> None:
    status, found = run("--rows", "default-cold,default-warm,fork-off,fork-code-path")
    assert (status, found["tokens_equal"], list(found["median"])) == (
        *(0, True),
        ["default-cold", "seed", "default-warm", "fork-off", "fork-code-path"],
    )
    assert FakeStart.started == [
        ("default-cold", "m", "home-0", "1", "default"),
        ("seed", "m", "warm", "0", "code"),
        ("default-warm", "m", "warm", "1", "default"),
        ("fork-off", "m", "home-3", "1", "off"),
        ("fork-code-path", "model-4", "home-4", "1", "code"),
    ]


def test_an_early_seed_starts_beside_the_first_row(run: Any) -> None:
    run("--rows", "default-cold,fork-safe", "--early-seed")
    assert [each[::3] for each in FakeStart.started] == [("seed", "0"), ("default-cold", "1"), ("fork-safe", "1")]


def test_on_one_gpu_all_share_it_and_start_one_after_the_other(run: Any) -> None:
    run("--rows", "default-cold,fork-safe", "--one-gpu")
    assert [each[::3] for each in FakeStart.started] == [("default-cold", "0"), ("seed", "0"), ("fork-safe", "0")]
    with pytest.raises(SystemExit):
        run("--rows", "default-cold", "--one-gpu", "--early-seed")


def test_a_row_that_does_not_fit_into_the_budget_is_skipped(run: Any) -> None:
    status, found = run("--rows", "default-cold,default-warm", "--budget", "140")
    assert (status, [each["row"] for each in found["runs"] if "skipped" in each]) == (0, ["default-warm"])


def test_a_start_without_an_answer_and_other_tokens_fail_the_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([LOG, LOG.replace("445", "446")])
    monkeypatch.setattr(FakeStart, "log_text", property(lambda _: next(texts)))
    assert run("--rows", "default-cold,default-cold")[0] == 1
    monkeypatch.setattr(FakeStart, "log_text", "RuntimeError: no memory\n")
    status, found = run("--rows", "default-cold")
    assert (status, found["runs"][0]["log"]) == (1, "RuntimeError: no memory\n")
