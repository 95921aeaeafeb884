"""A worker's metrics reach the front end's page, also after the worker has ended, and never harm vLLM's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest

from vllm_rfork.metrics import front_end
from vllm_rfork.metrics.front_end import OWN_DIRECTORY, VLLMS_DIRECTORY

#: A front end, and two workers that it starts as vLLM does: another process, with its environment.
FRONT_END = """
import os, subprocess, sys
from prometheus_client import REGISTRY, generate_latest
from vllm_rfork.metrics import front_end

front_end.show_workers()
front_end.show_workers()
workers = [subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=-1, stdout=-1, text=True) for _ in range(2)]
for each in workers:
    each.stdout.readline()
alive = generate_latest(REGISTRY).decode()
for each in workers:
    each.communicate()
ended = generate_latest(REGISTRY).decode()
print(os.environ["RFORK_METRICS_DIR"], oct(os.stat(os.environ["RFORK_METRICS_DIR"]).st_mode & 0o777))
if os.fork() == 0:
    sys.exit()
os.wait()
assert os.path.isdir(os.environ["RFORK_METRICS_DIR"]), "a forked process is not the owner"
print(alive, "ENDED", ended)
"""
WORKER = """
import sys
from vllm_rfork.metrics import worker

worker.started(version="1", vllm_version="2", torch_version="3", device="cpu")
worker.loaded("seed", nbytes=7, seconds=0.7, lane="nixl/cma")
worker.seed_state("serving")
print("ready", flush=True)
sys.stdin.read()
"""


def test_metrics_of_a_worker_reach_the_front_end(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    for variable in (OWN_DIRECTORY, VLLMS_DIRECTORY):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, "-c", FRONT_END, WORKER], env=environment, capture_output=True, text=True, check=True
    )
    where, _, pages = done.stdout.partition("\n")
    directory, mode = where.split()
    assert Path(directory).parent == tmp_path
    assert mode == "0o700"
    alive, ended = pages.split("ENDED")
    for page in (alive, ended):
        assert 'rfork_loads_total{engine="nixl",lane="nixl/cma",outcome="ok",source="seed"} 2.0' in page
        assert 'rfork_load_seconds_bucket{le="1.0",source="seed"} 2.0' in page
        assert 'rfork_load_seconds_count{source="seed"} 2.0' in page
        assert "python_info" in page
    assert 'rfork_seed_state{state="serving"} 2.0' in alive
    assert 'rfork_build_info{device="cpu",torch_version="3",version="1",vllm_version="2"} 1.0' in alive
    assert "rfork_seed_state" not in ended
    assert "rfork_build_info" not in ended
    assert list(tmp_path.iterdir()) == [], "removed at the end of the front end"


def test_a_file_that_cannot_be_read_hides_no_other_metric(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "counter_rfork-1.db").write_bytes(b"")
    registry = CollectorRegistry()
    Counter("vllm:requests", "vLLM's own", registry=registry).inc()
    registry.register(front_end._Workers(tmp_path))
    for _ in range(2):
        assert b"vllm:requests_total 1.0" in generate_latest(registry)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path) in caplog.text


def test_a_front_end_without_a_directory_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(**arguments: object) -> str:
        raise FileNotFoundError("no usable temporary directory")

    for variable in (OWN_DIRECTORY, VLLMS_DIRECTORY):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(front_end._Shown, "tried", False)
    monkeypatch.setattr(front_end.tempfile, "mkdtemp", refused)
    for _ in range(2):
        front_end.show_workers()
    assert OWN_DIRECTORY not in os.environ
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "TMPDIR" in caplog.text


def test_a_front_end_that_cannot_show_its_workers_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(collector: object) -> None:
        raise ValueError("there is one already")

    for variable in (OWN_DIRECTORY, VLLMS_DIRECTORY):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(front_end._Shown, "tried", False)
    monkeypatch.setattr(front_end.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(front_end.REGISTRY, "register", refused)
    front_end.show_workers()
    assert list(tmp_path.iterdir()) == []
    assert OWN_DIRECTORY not in os.environ
