"""Fixtures with real vLLM: planners and seeds in processes of their own, a receiver in this one."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import pytest

from tests.open_engines import open_engines
from tests.standin.build import build, environment
from tests.vllm import models
from vllm_rfork.startup.worker_caches import no_caches
from zoo.planner import FleetPlanner, Planner, eventually
from zoo.processes import fork_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def propagating_loggers() -> None:
    """Leave the package's loggers below vLLM's, where ``plugin.register`` has put them."""


@pytest.fixture(autouse=True)
def no_caches_of_earlier_tests() -> Iterator[None]:
    """End the caches of the test's starts: models of one process share them until warm-up, which few tests reach."""
    yield
    no_caches()


@pytest.fixture(scope="session")
def vllm_imported() -> Iterator[None]:
    """A fork server: its processes start with vLLM imported, have one thread each and can use the Ascend stand-in."""
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(build()).items():
                patch.setenv(name, value)
            stack.enter_context(fork_server(threads=1))
        yield


class ForkedModule:
    """``python -m module argument`` in a process of the fork server, with the parts of Popen that tests use."""

    def __init__(self, module: str, argument: str, answers: int) -> None:
        self.args = (module, argument)
        context = multiprocessing.get_context("forkserver")
        (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
        ends = (
            Connection(read_in, writable=False),
            Connection(write_out, readable=False),
            Connection(os.dup(answers), readable=False),
        )
        self._process = context.Process(target=_run_module, args=(module, argument, *ends), daemon=True)
        self._process.start()
        for end in ends:
            end.close()
        self.stdin, self.stdout = os.fdopen(write_in, "w"), os.fdopen(read_out)

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def _run_module(module: str, argument: str, stdin: Connection, stdout: Connection, answers: Connection) -> None:
    os.dup2(stdin.fileno(), 0)
    sys.stdin = os.fdopen(0)
    for number in (1, 2):
        os.dup2(stdout.fileno(), number)
    stdin.close()
    stdout.close()
    sys.argv = [module, argument, str(answers.fileno())]
    runpy.run_module(module, run_name="__main__")


class LineProcess:
    """A module in a process of its own that reads lines as orders and answers with lines of JSON.

    The answers have a pipe, whose number is the module's second argument: on standard output another thread's log line
    could come between the pieces of an answer.

    ``forked`` is for tests that have the fixture ``vllm_imported``: the process starts in a second instead of twenty.
    """

    def __init__(self, module: str, argument: str, *, env: dict[str, str] | None = None, forked: bool = False) -> None:
        self.process: subprocess.Popen[str] | ForkedModule
        read_answers, write_answers = os.pipe()
        if forked:
            self.process = ForkedModule(module, argument, write_answers)
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, argument, str(write_answers)],
                cwd=ROOT,
                env={**os.environ, **(env or {})},
                pass_fds=[write_answers],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        os.close(write_answers)
        self._answers: list[dict[str, Any]] = []
        self._log: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_log, daemon=True),
            threading.Thread(target=self._read_answers, args=(os.fdopen(read_answers),), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._log.append(line)

    def _read_answers(self, pipe: TextIO) -> None:
        with pipe:
            for line in pipe:
                self._answers.append(json.loads(line))

    def wait(self, number: int = 1, timeout_s: float = 600.0) -> dict[str, Any]:
        """Return answer ``number``, counted from 1; the process sends the first one without an order."""

        def ready() -> bool:
            assert self.process.poll() is None or len(self._answers) >= number, "".join(self._log[-50:])
            return len(self._answers) >= number

        eventually(ready, f"answer {number} of {self.process.args}", timeout_s)
        return self._answers[number - 1]

    def order(self, line: str) -> dict[str, Any]:
        """Send an order and return the answer."""
        self.wait()
        number = len(self._answers) + 1
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.wait(number)

    @property
    def first(self) -> dict[str, Any]:
        return self.wait()

    @property
    def log(self) -> str:
        return "".join(self._log)

    def end(self) -> None:
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(10)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


class SeedProcess(LineProcess):
    """``seed_main`` in a process of the fork server; see the fixture ``vllm_imported``."""

    def __init__(self, model: Path, extra: dict[str, Any], **changes: Any) -> None:
        arguments = json.dumps({"model": str(model), "extra": extra, "changes": changes})
        super().__init__("tests.vllm.seed_main", arguments, forked=True)

    @property
    def said(self) -> dict[str, Any]:
        """The addresses of its seeds and the digests of the loaded tensors."""
        return self.first


def extra_for(planner_url: str, **more: Any) -> dict[str, Any]:
    """Return the options that all tests share, with the memory engine, which needs no package."""
    return {
        "model_url": "tiny",
        "model_deploy_strategy_name": "test",
        "rfork_scheduler_url": planner_url,
        "rfork_seed_advertise_host": "127.0.0.1",
        "rfork_seed_bind_host": "127.0.0.1",
        "rfork_request_timeout_sec": 10.0,  # a busy machine's planner takes its time
        "rfork_engine": "memory",
        **more,
    }


@pytest.fixture(scope="session")
def model_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.qwen2(tmp_path_factory.mktemp("a"))


@pytest.fixture(scope="session")
def model_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape with other weights."""
    return models.qwen2(tmp_path_factory.mktemp("b"), seed=models.WEIGHTS_B)


@pytest.fixture(scope="session")
def model_a_without_weights(model_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.without_weights(model_a, tmp_path_factory.mktemp("none"))


@pytest.fixture(scope="session")
def planner() -> Iterator[Planner]:
    running = Planner()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def fleet_planner() -> Iterator[Planner]:
    """This package's planner, which notices at once when a seed's process dies."""
    running = FleetPlanner()
    yield running
    running.stop()


@pytest.fixture(scope="session")
def seed(vllm_imported: None, planner: Planner, model_a: Path) -> Iterator[SeedProcess]:
    """A worker that loaded model A from storage and is announced."""
    process = SeedProcess(model_a, extra_for(planner.url, rfork_heartbeat_interval_sec=2.0))
    process.wait()
    eventually(planner.seeds, "seed is announced")
    yield process
    process.end()


@pytest.fixture
def no_seeds() -> Iterator[None]:
    """Withdraw the seeds of this process before and after the test."""
    from vllm_rfork.seeding.manager import manager

    manager().withdraw("a test begins", last=True)
    yield
    manager().withdraw("a test is over", last=True)
    eventually(lambda: not open_engines(), "every engine is closed")


@pytest.fixture
def runtime_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow the runtime layout on this CPU, and keep vLLM from packing weights into native objects."""
    from vllm.model_executor.layers import utils

    monkeypatch.setattr("vllm_rfork.load.context.NO_RUNTIME", frozenset())
    monkeypatch.setattr(utils, "check_cpu_sgl_kernel", lambda *args: False)
    monkeypatch.setattr(utils.ops, "_supports_onednn", False)


class LogRecords(logging.Handler):
    """The package's log records; its loggers do not propagate to the root logger, which ``caplog`` uses."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def texts(self, level: int = logging.DEBUG) -> list[str]:
        """Return the messages of exactly this level, or all for DEBUG."""
        return [r.getMessage() for r in list(self.records) if level in (logging.DEBUG, r.levelno)]

    @property
    def warnings(self) -> list[str]:
        return self.texts(logging.WARNING)


@pytest.fixture
def rfork_log() -> Iterator[LogRecords]:
    handler = LogRecords()
    logger = logging.getLogger("vllm_rfork")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def default_a(model_a: Path) -> Any:
    """Model A as vLLM's default loader makes it."""
    from tests.vllm.engine_process import load_digested, vllm_config

    return load_digested(vllm_config(model_a))
