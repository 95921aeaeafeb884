"""pytest plugins of ``python -m zoo`` and ``python -m zoo.events``: parameters, shared processes and the documents.

Each run of pytest gets one of them with the command line's arguments. The work itself starts in the background when
the first test asks for it, since models and engines run at the same time; each test waits for its own result.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from zoo import results, scenario_results, scenarios
from zoo.case import Case
from zoo.planner import FleetPlanner, Planner
from zoo.processes import fork_server, platform_facts
from zoo.run import Row, Setting, run
from zoo.scenario_engines import Stage, made, plugin_options
from zoo.scenario_results import CHECKS, Sheet

HERE = Path(__file__).parent


def add_options(parser: argparse.ArgumentParser, work: Path) -> None:
    """Add the options that both commands have."""
    parser.add_argument("--engine", default="auto", help="the plugin's rfork_engine")
    parser.add_argument("--option", action="append", default=[], help="another option of the plugin: NAME=JSON")
    parser.add_argument("--llm", default="{}", help="more of vLLM's engine arguments, as JSON")
    parser.add_argument("--seed-devices", default="", help="devices that seeds see, as vLLM's platform counts them")
    parser.add_argument("--receiver-devices", default="", help="devices that all others see")
    parser.add_argument("--jobs", type=int, help="how many start at once")
    parser.add_argument("--threads", type=int, help="each process's on the processor")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one load or step may take")
    parser.add_argument("--work", type=Path, default=work, help="folder of checkpoints and logs")
    parser.add_argument("--write", type=Path, help="the document whose table of this platform is replaced")


def run_pytest(file: str, plugin: object, more: list[str]) -> int:
    """Run one file of this folder with ``plugin`` and more of pytest's arguments; return pytest's exit status."""
    return int(pytest.main(["-c", str(HERE / "pytest.ini"), str(HERE / file), *more], plugins=[plugin]))


@contextlib.contextmanager
def platform(arguments: argparse.Namespace, threads: int) -> Iterator[tuple[dict[str, Any], Planner]]:
    """Start the fork server and a planner; yield the facts about the platform, and the planner."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    with fork_server(threads=arguments.threads or max(1, threads)):
        facts = platform_facts(arguments.work)
        planner = FleetPlanner()
        try:
            yield facts, planner
        finally:
            planner.stop()


class Models:
    """The run of ``zoo/test_models.py``."""

    def __init__(self, cases: list[Case], arguments: argparse.Namespace) -> None:
        self.cases = cases
        self.arguments = arguments
        self._facts: dict[str, Any] = {}
        self._rows: dict[str, Future[Row]] = {}
        self._began = time.monotonic()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per case."""
        metafunc.parametrize("case", self.cases, ids=[case.name for case in self.cases])

    @pytest.fixture(scope="session")
    def rows(self, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Row]]]:
        """The row of each selected case; ``--jobs`` cases run at once, by default two on CPU, else one."""
        arguments, cores = self.arguments, os.cpu_count() or 1
        items = (item for item in request.session.items if isinstance(item, pytest.Function))
        selected = [cast(Case, item.callspec.params["case"]) for item in items]
        with platform(arguments, cores // 2) as (self._facts, planner):
            visible = str(self._facts["visible_devices_variable"])
            setting = Setting(
                traits=frozenset(self._facts["traits"]),
                work=arguments.work.resolve(),
                planner=planner,
                options={"rfork_engine": arguments.engine, **plugin_options(arguments.option)},
                engine_arguments=json.loads(arguments.llm),
                seed_environment={visible: arguments.seed_devices} if arguments.seed_devices else {},
                receiver_environment={visible: arguments.receiver_devices} if arguments.receiver_devices else {},
                timeout_s=arguments.timeout,
            )
            jobs = arguments.jobs or (min(2, cores) if self._facts["platform"] == "cpu" else 1)
            pool = concurrent.futures.ThreadPoolExecutor(jobs)
            try:
                self._rows = {case.name: pool.submit(run, case, setting) for case in selected}
                yield self._rows
            finally:
                pool.shutdown(cancel_futures=True)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table, and write it into zoo.json and the document."""
        rows = [row.result() for row in self._rows.values() if row.done() and not row.cancelled()]
        if not rows:
            return
        seconds = time.monotonic() - self._began
        outcome = results.Outcome(self._facts, [dataclasses.asdict(row) for row in rows], seconds)
        file = self.arguments.work / "zoo.json"
        file.write_text(json.dumps(dataclasses.asdict(outcome), indent=1), encoding="utf-8")
        terminalreporter.write_line(results.table(outcome))
        if self.arguments.write:
            results.replace(self.arguments.write, outcome)


class Events:
    """The run of ``zoo/test_events.py``; every scenario runs, whichever checks are selected."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._facts: dict[str, Any] = {}
        self._sheet = Sheet()
        self._began = time.monotonic()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per check."""
        metafunc.parametrize("check", list(CHECKS))

    @pytest.fixture(scope="session")
    def sheet(self) -> Iterator[Sheet]:
        """The sheet that the scenarios fill."""
        logs = self.arguments.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for old in logs.iterdir():
            old.unlink()
        with platform(self.arguments, (os.cpu_count() or 1) // 4) as (self._facts, planner):
            stage = made(self.arguments, self._sheet, planner, self._facts)
            playing = threading.Thread(target=self._play, args=(stage,))
            playing.start()
            yield self._sheet
            playing.join()

    def _play(self, stage: Stage) -> None:
        try:
            scenarios.default_load(stage)
            if stage.default.answers:
                with concurrent.futures.ThreadPoolExecutor(len(scenarios.SCENARIOS)) as pool:
                    for future in [pool.submit(scenario, stage) for scenario in scenarios.SCENARIOS]:
                        if error := future.exception():
                            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            self._sheet.close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print every row, and write them into events.json and the document."""
        if not self._facts:
            return
        rows = self._sheet.rows()
        for row in rows:
            terminalreporter.write_line(str(row))
        seconds = time.monotonic() - self._began
        outcome = scenario_results.Outcome(self._facts, [dataclasses.asdict(row) for row in rows], seconds)
        terminalreporter.write_line(f"{outcome.count()} in {seconds:.0f} s; logs in {self.arguments.work / 'logs'}")
        file = self.arguments.work / "events.json"
        file.write_text(json.dumps(dataclasses.asdict(outcome), indent=1), encoding="utf-8")
        if self.arguments.write:
            scenario_results.replace(self.arguments.write, outcome)
