"""The engines' benchmark on the memory engine, with sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import engine_deaths, engines
from bench.engine_memory import HostTensors


def test_one_run_measures_an_engine_and_its_peers_deaths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_deaths, "READ_ON_S", 0.3)
    out = tmp_path / "engines.json"
    small = ["--gib", "0.002", "--tensors", "5,300", "--passes", "1", "--out", str(out)]
    assert engines.main(["--engines", "memory", *small]) == 0
    result = json.loads(out.read_text())["engines"]["memory"]
    assert set(result["tensors"]) == {"5", "300"}
    for row in result["tensors"].values():
        assert min(row["gb_per_s"], row["of_raw"], row["first_of_raw"], row["open_s"]["seed"]) > 0
    assert result["deaths"]["receiver killed"].endswith("bytes are right")
    assert result["deaths"]["seed killed"].startswith("an error after")
    assert "| memory | seed killed " in capsys.readouterr().out


def test_an_engine_that_cannot_be_measured_is_reported_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "engines.json"
    assert engines.main(["--engines", "cuda_ipc", "--gib", "0.001", "--tensors", "5", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["engines"]["cuda_ipc"]["unavailable"] in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["flip_byte=17", "truncate_read=1", "fail_read=1"])
def test_an_engine_that_fails_or_delivers_wrong_bytes_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("RFORK_MEMORY_FAULT", fault)
    small = ["--gib", "0.001", "--tensors", "5", "--passes", "1", "--no-deaths"]
    assert engines.main(["--engines", "memory", *small, "--out", str(tmp_path / "engines.json")]) == 1


def test_tensors_of_two_processes_have_the_same_contents_and_neighbours_differ() -> None:
    one, other = HostTensors(50, 100_000), HostTensors(50, 100_000)
    one.fill()
    assert one.is_right()
    assert not other.is_right()
    assert [size for _, size in one.regions()] == [size for _, size in other.regions()]
    assert len(one.regions()) == 50
