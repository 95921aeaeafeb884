"""Caches from process to process over real seed services with TLS: a chain of three, and seeds that fail on the way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.authority import Authority
from tests.planner.processes import ROOT

Environment = dict[str, str]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """The environment of a fleet's workers."""
    authority = Authority(tmp_path / "ca")
    cert, key = authority.issue("worker", names=("127.0.0.1",))
    return {
        "RFORK_CACHES": "code",
        "RFORK_TOKEN": "first-s3cret",
        "RFORK_TLS_CA_FILE": str(authority.file),
        "RFORK_TLS_CERT_FILE": str(cert),
        "RFORK_TLS_KEY_FILE": str(key),
        "RFORK_SEED_TLS": "require",
    }


class Process:
    """One worker process."""

    def __init__(self, folder: Path, environment: Environment, max_model_len: str) -> None:
        self.root = folder / "caches"
        self.log = folder.parent / f"{folder.name}.log"
        given = {"root": str(self.root), "folder": folder.name, "max_model_len": max_model_len}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.flow.cache_worker", json.dumps(given)],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()
        return dict(json.loads(line))

    def tell(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def workers(folder: Path, *environments: Environment, lengths: str = "8192 8192 8192") -> Iterator[list[Process]]:
    """Processes, one for each environment, that have started."""
    made = [
        Process(folder / f"w{number}", each, length)
        for (number, each), length in zip(enumerate(environments), lengths.split(), strict=False)
    ]
    try:
        yield made
    finally:
        for each in made:
            each.end()


OFFERS = ["autotune_table rank0", "torch_aot rank_0_0"]


def test_a_chain_of_three_carries_code_and_tables(tmp_path: Path, environment: Environment) -> None:
    with workers(tmp_path, environment, environment, environment) as chain:
        addresses = [each.answer()["address"] for each in chain]
        chain[0].tell("forward")
        assert chain[0].tell("warm") == {"announced": "", "offers": OFFERS}
        for number in (1, 2):
            before, worker = chain[number - 1], chain[number]
            worker.tell(f"fork {addresses[number - 1]}")
            worker.tell("fetched")
            before.end()
            worker.tell("forward")
            assert worker.tell("warm") == {"announced": "torch_aot=hit,autotune_table=hit;saved=39", "offers": OFFERS}
            assert "saved about 39.0 s" in worker.log.read_text()
            assert "s3cret" not in worker.log.read_text()


@pytest.mark.long
def test_without_tls_tables_arrive_and_code_does_not(tmp_path: Path, environment: Environment) -> None:
    plain = {"RFORK_CACHES": "code", "RFORK_TOKEN": "first-s3cret"}
    with workers(tmp_path, plain, plain) as (seed, worker):
        address = seed.answer()["address"]
        worker.answer()
        seed.tell("forward")
        assert seed.tell("warm")["offers"] == OFFERS[:1]
        worker.tell(f"fork {address}")
        worker.tell("fetched")
        worker.tell("forward")
        assert worker.tell("warm")["announced"] == "torch_aot=miss:trust,autotune_table=hit;saved=19.5"
        assert worker.log.read_text().count("caches of code are not taken: set rfork_seed_tls to require") == 1
        assert seed.log.read_text().count("caches of code are not offered: set rfork_seed_tls to require") == 1


@pytest.mark.long
def test_a_seed_that_hangs_and_dies_delays_nothing(tmp_path: Path, environment: Environment) -> None:
    with workers(tmp_path, environment, environment) as (seed, worker):
        address = seed.answer()["address"]
        worker.answer()
        seed.tell("forward")
        seed.tell("warm")
        os.kill(seed.process.pid, signal.SIGSTOP)
        worker.tell(f"fork {address}")
        assert worker.tell("forward")["took_s"] < 1.0
        seed.end()
        assert worker.tell("warm") == {"announced": "torch_aot=miss:late,autotune_table=miss:late", "offers": OFFERS}


@pytest.mark.long
def test_workers_that_differ_name_the_difference(tmp_path: Path, environment: Environment) -> None:
    with workers(tmp_path, environment, environment, lengths="8192 4096") as (seed, worker):
        address = seed.answer()["address"]
        worker.answer()
        seed.tell("forward")
        seed.tell("warm")
        worker.tell(f"fork {address}")
        worker.tell("fetched")
        worker.tell("forward")
        announced = worker.tell("warm")["announced"]
        assert announced == "torch_aot=miss:identity,autotune_table=miss:identity"
        assert "torch_aot (identity: max_model_len: 4096 here, 8192 on 1 seed)" in worker.log.read_text()
