"""``python -m zoo``: forks every model of the catalogue and writes the table."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from zoo import results
from zoo.case import Case, from_file
from zoo.catalogue import CATALOGUE
from zoo.planner import ROOT, FleetPlanner
from zoo.processes import fork_server, platform_facts
from zoo.run import Row, Setting, run


def main() -> int:
    """Run what was asked for; 1 where something came otherwise than it should."""
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    parser.add_argument("--only", default="", help="names, separated by commas; default: all")
    parser.add_argument("--models", type=Path, help="JSON file of more models, made like those of the catalogue")
    parser.add_argument("--scale", type=int, default=1, help="how many times as wide every model is made")
    parser.add_argument("--engine", default="auto", help="the plugin's rfork_engine")
    parser.add_argument("--option", action="append", default=[], help="another option of the plugin: NAME=JSON")
    parser.add_argument("--llm", default="{}", help="more of vLLM's engine arguments for every model, as JSON")
    parser.add_argument("--seed-devices", default="", help="devices the seed sees, as vLLM's platform counts them")
    parser.add_argument("--receiver-devices", default="", help="devices the default load and the fork see")
    parser.add_argument("--jobs", type=int, help="models at once; default: two on CPU, else one")
    parser.add_argument("--threads", type=int, help="each load's on the processor; default: half the cores")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one load may take")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "zoo", help="folder of checkpoints and logs")
    parser.add_argument("--write", type=Path, help="the document whose table of this platform is replaced")
    parser.add_argument("--list", action="store_true", help="list the models and end")
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="ZOO_JSON", help="run nothing: show what earlier runs found"
    )
    arguments = parser.parse_args()

    if arguments.render:
        _show(results.merged([results.load(path) for path in arguments.render]), arguments.write)
        return 0
    cases = CATALOGUE if arguments.models is None else from_file(arguments.models, CATALOGUE)
    if arguments.only:
        wanted = arguments.only.split(",")
        known = {case.name: case for case in cases}
        if unknown := [name for name in wanted if name not in known]:
            parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(known)}")
        cases = [known[name] for name in wanted]
    if arguments.list:
        for case in cases:
            print(f"{case.name:18} {case.covers}")
        return 0
    cases = [case.scaled(arguments.scale) for case in cases]
    started = time.monotonic()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with fork_server(threads=arguments.threads or max(1, (os.cpu_count() or 1) // 2)):
        facts = platform_facts(arguments.work)
        visible = str(facts["visible_devices_variable"])
        planner = FleetPlanner()
        try:
            setting = Setting(
                traits=frozenset(facts["traits"]),
                work=arguments.work.resolve(),
                planner=planner,
                options={"rfork_engine": arguments.engine, **_options(arguments.option)},
                engine_arguments=json.loads(arguments.llm),
                seed_environment={visible: arguments.seed_devices} if arguments.seed_devices else {},
                receiver_environment={visible: arguments.receiver_devices} if arguments.receiver_devices else {},
                timeout_s=arguments.timeout,
            )
            jobs = arguments.jobs or (min(2, os.cpu_count() or 1) if facts["platform"] == "cpu" else 1)
            rows = _all(cases, setting, jobs)
        finally:
            planner.stop()
    outcome = results.Outcome(facts, [dataclasses.asdict(row) for row in rows], time.monotonic() - started)
    (arguments.work / "zoo.json").write_text(json.dumps(dataclasses.asdict(outcome), indent=1), encoding="utf-8")
    _show(outcome, arguments.write)
    return 1 if any(row.failures for row in rows) else 0


def _show(outcome: results.Outcome, document: Path | None) -> None:
    print(results.table(outcome))
    if document:
        results.replace(document, outcome)


def _options(given: list[str]) -> dict[str, object]:
    pairs = (text.partition("=") for text in given)
    return {name: json.loads(value) for name, _, value in pairs}


def _all(cases: list[Case], setting: Setting, jobs: int) -> list[Row]:
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_timed, case, setting): case for case in cases}
        for done in concurrent.futures.as_completed(futures):
            row, seconds = done.result()
            print(
                f"{row.name:18} {row.outcome:8} {seconds:6.1f} s  {'; '.join(row.failures)}",
                file=sys.stderr,
                flush=True,
            )
    return [future.result()[0] for future in futures]


def _timed(case: Case, setting: Setting) -> tuple[Row, float]:
    started = time.monotonic()
    return run(case, setting), time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
