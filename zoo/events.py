"""``python -m zoo.events``: scenarios in the lives of seeds and receivers, on real engines of any platform.

Sleep mode, expandable segments, reloads, updates, cache resets, old epochs, a seed killed while it is read, an altered
byte, and the memory that a fork needs. Each check prints one line: its name, what is expected, what was seen, and
``ok``, ``FAILED`` or ``not here``. The exit status is 1 if one failed. ``scenario_results.CHECKS`` lists all checks.

Each engine is a process of its own (``zoo.scenario_worker``); independent ones start at the same time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zoo import checkpoints, scenario_results, scenarios
from zoo.case import Case
from zoo.catalogue import CATALOGUE
from zoo.planner import ROOT, FleetPlanner, Planner
from zoo.processes import fork_server, in_a_process, platform_facts
from zoo.scenario_engines import Stage
from zoo.scenario_results import Sheet


def main() -> int:
    """Run every scenario; 1 where a check has failed."""
    arguments = _parse()
    if arguments.render:
        outcome = scenario_results.load(arguments.render)
        print(scenario_results.table(outcome))
        if arguments.write:
            scenario_results.replace(arguments.write, outcome)
        return 0
    began = time.monotonic()
    sheet = Sheet(lambda text: print(text, flush=True))
    (arguments.work / "logs").mkdir(parents=True, exist_ok=True)
    for old in (arguments.work / "logs").iterdir():
        old.unlink()
    with fork_server(threads=arguments.threads or max(1, (os.cpu_count() or 1) // 4)):
        facts = platform_facts(arguments.work)
        planner = FleetPlanner()
        try:
            stage = _stage(arguments, sheet, planner, facts)
            scenarios.default_load(stage)
            if stage.default.answers:
                _together(stage, scenarios.SCENARIOS)
        finally:
            planner.stop()
    rows = [dataclasses.asdict(row) for row in sheet.rows()]
    outcome = scenario_results.Outcome(facts, rows, time.monotonic() - began)
    for row in sheet.rows():
        if row.seen == "not reached":
            print(row)
    print(f"{outcome.count()} in {outcome.seconds:.0f} s; logs in {arguments.work / 'logs'}")
    (arguments.work / "events.json").write_text(json.dumps(dataclasses.asdict(outcome), indent=1), encoding="utf-8")
    if arguments.write:
        scenario_results.replace(arguments.write, outcome)
    return 1 if outcome.failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m zoo.events", description=__doc__)
    parser.add_argument("--engine", default="auto", help="the plugin's rfork_engine")
    parser.add_argument("--option", action="append", default=[], help="another option of the plugin: NAME=JSON")
    parser.add_argument("--llm", default="{}", help="more of vLLM's engine arguments, as JSON")
    parser.add_argument("--seed-devices", default="", help="devices that seeds see, as vLLM's platform counts them")
    parser.add_argument("--receiver-devices", default="", help="devices that all others see")
    parser.add_argument("--scale", type=int, help="how many times as wide the model is made; default: 16, on CPU 1")
    parser.add_argument("--jobs", type=int, help="engines that start at once; default: 4, on CPU 2")
    parser.add_argument("--threads", type=int, help="each engine's on the processor; default: a quarter of the cores")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one step of a check may take")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "events", help="folder of checkpoints and logs")
    parser.add_argument("--write", type=Path, help="the document whose table of this platform is replaced")
    parser.add_argument("--render", type=Path, metavar="EVENTS_JSON", help="run nothing: show what a run found")
    return parser.parse_args()


def _stage(arguments: argparse.Namespace, sheet: Sheet, planner: Planner, facts: dict[str, Any]) -> Stage:
    on_cpu = facts["platform"] == "cpu"
    (llama,) = (case for case in CATALOGUE if case.name == "llama")
    case = llama.scaled(arguments.scale or (1 if on_cpu else 16))
    folder, other = (arguments.work.resolve() / name for name in ("model", "other"))
    log = arguments.work / "logs" / "make"
    in_a_process(checkpoints.make, case, folder, log=log)
    in_a_process(make_other, case, other, log=log)
    starting = threading.Semaphore(arguments.jobs or (2 if on_cpu else 4))
    return Stage(sheet, planner, facts, arguments, folder, other, starting)


def make_other(case: Case, folder: Path) -> None:
    """The same model with other weights."""
    import transformers

    if (folder / "config.json").exists():
        recipe = (folder / checkpoints.MARKER).read_text(encoding="utf-8")
        if recipe == case.recipe():
            return
    model_class = getattr(transformers, case.model_class)
    config = model_class.config_class(**case.settings)
    checkpoints.save(model_class, config, folder, checkpoints.SEED + 1, device=checkpoints.maker_device())
    (folder / checkpoints.MARKER).write_text(case.recipe(), encoding="utf-8")


def _together(stage: Stage, scenarios: Sequence[Callable[[Stage], None]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(scenarios)) as pool:
        for future in [pool.submit(scenario, stage) for scenario in scenarios]:
            if error := future.exception():
                print(f"{type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
