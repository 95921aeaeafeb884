"""Comparison of the weights phase: the default loader from page cache, and forks through each engine.

Runs are interleaved, so that a change in the machine's speed affects all of them; medians are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.ending import end
from demo.servers import planner
from tests.standin.build import build, environment

ROOT = Path(__file__).parents[1]
ENGINES = ("nixl", "yuanrong")


class Worker:
    """A :mod:`bench.worker` in a process of its own."""

    def __init__(self, name: str, setting: dict[str, Any], env: dict[str, str], logs: Path) -> None:
        self.name = name
        self._log = (logs / f"{name}.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps(setting)],
            cwd=ROOT,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def load(self, *, keep: bool = False) -> dict[str, Any]:
        """Order one load; with ``keep`` the worker keeps the model and becomes a seed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("the worker has no pipes")
        stdin.write(json.dumps({"order": "load", "keep": keep}) + "\n")
        stdin.flush()
        for line in stdout:
            if line.startswith("BENCH "):
                return dict(json.loads(line.removeprefix("BENCH ")))
            self._log.write(line)
        raise RuntimeError(f"worker {self.name} ended; its log is {self._log.name}")

    def end(self) -> None:
        """Let the worker withdraw and exit."""
        end(self._process)
        self._log.close()


@contextlib.contextmanager
def workers(
    model: Path, planner_url: str, logs: Path, *, receivers: int = 1, post_process: bool = False
) -> Iterator[dict[str, Worker]]:
    """A default worker and, per engine, a seed that is up and a receiver; all are ended afterwards."""
    made: dict[str, Worker] = {}
    try:
        plain = {"model": str(model), "load_format": "auto", "extra": {}, "post_process": post_process}
        made["default"] = Worker("default", plain, {}, logs)
        for engine in ENGINES:
            env = environment(build()) if engine == "yuanrong" else {}
            for role in ("seed", engine):
                extra = {
                    "model_url": f"bench-{engine}",
                    "model_deploy_strategy_name": "bench",
                    "rfork_scheduler_url": planner_url,
                    "rfork_engine": engine,
                    "rfork_seed_advertise_host": "127.0.0.1",
                    "rfork_become_seed": role == "seed",
                }
                setting = {"model": str(model), "load_format": "rfork", "extra": extra, "post_process": post_process}
                name = f"seed-{engine}" if role == "seed" else engine
                made[name] = Worker(name, setting, env, logs)
                if role == "seed" and not made[name].load(keep=True)["announced"]:
                    raise RuntimeError(f"the {engine} seed did not come up; see {logs}")
        yield made
    finally:
        for worker in reversed(made.values()):
            worker.end()


def interleaved(model: Path, logs: Path, runs: int) -> dict[str, dict[str, Any]]:
    """Per loader: median seconds and GB/s, all seconds, median seconds by stage; one warm-up run each first."""
    names = ("default", *ENGINES)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with planner(logs) as running, workers(model, running.url, logs) as made:
        for number in range(runs + 1):
            for name in names:
                took = made[name].load()
                if name != "default" and not took["seed"]:
                    raise RuntimeError(f"{name} loaded from storage instead of forking; see {logs}")
                if number:
                    results[name].append(took)
    return {name: _summary(took) for name, took in results.items()}


def _summary(took: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [run["seconds"] for run in took]
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "all_seconds": sorted(seconds),
        "nbytes": took[0]["nbytes"],
        "gb_per_s": took[0]["nbytes"] / median / 1e9,
        "stages": {
            stage: statistics.median(run["stages"].get(stage, 0.0) for run in took) for stage in took[0]["stages"]
        },
    }


def peaks(model: Path, logs: Path) -> dict[str, int]:
    """Peak resident bytes of one whole load each, post-processing included, in fresh processes."""
    found: dict[str, int] = {}
    plain = {"model": str(model), "load_format": "auto", "extra": {}, "post_process": True}
    with planner(logs) as running:
        extra = {
            "model_url": "bench-peak",
            "model_deploy_strategy_name": "bench",
            "rfork_scheduler_url": running.url,
            "rfork_engine": "nixl",
            "rfork_seed_advertise_host": "127.0.0.1",
        }
        forking = {**plain, "load_format": "rfork", "extra": extra}
        seed = Worker("peak-seed", forking, {}, logs)
        others: list[Worker] = []
        try:
            found["seed, loaded from storage"] = seed.load(keep=True)["peak_nbytes"]
            for name, setting in {
                "default loader": plain,
                "receiver that becomes a seed": forking,
                "receiver that does not": {**forking, "extra": {**extra, "rfork_become_seed": False}},
            }.items():
                worker = Worker(f"peak-{len(others)}", setting, {}, logs)
                others.append(worker)
                found[name] = worker.load(keep=True)["peak_nbytes"]
                worker.end()
        finally:
            for worker in (*others, seed):
                worker.end()
    return found
