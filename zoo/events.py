"""``python -m zoo.events``: what befalls seeds and receivers in their lives, on real engines of whatever platform.

Sleep mode, expandable segments, reloads, updates, caches that are reset, old epochs, a seed that is killed while it is
read, a byte that is altered, and what a fork costs in memory. One line per check: its name, what is expected, what was
seen, and ``ok``, ``FAILED`` or ``not here``; ends with 1 where one has failed. ``events_sheet.CHECKS`` has all of them.

Every engine is a process of its own (``zoo.events_worker``); independent ones start at the same time.
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

from zoo import checkpoints, events_scenarios, events_sheet
from zoo.catalogue import CATALOGUE
from zoo.events_sheet import Sheet
from zoo.events_stage import Stage
from zoo.planner import ROOT, FleetPlanner, Planner
from zoo.specimen import Specimen
from zoo.stage import fork_server, in_a_process, platform_facts


def main() -> int:
    """Run every scenario; 1 where a check has failed."""
    arguments = _parse()
    if arguments.render:
        outcome = events_sheet.load(arguments.render)
        print(events_sheet.table(outcome))
        if arguments.write:
            events_sheet.replace(arguments.write, outcome)
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
            events_scenarios.default_load(stage)
            if stage.default.answers:
                _together(stage, events_scenarios.SCENARIOS)
        finally:
            planner.stop()
    rows = [dataclasses.asdict(row) for row in sheet.rows()]
    outcome = events_sheet.Outcome(facts, rows, time.monotonic() - began)
    for row in sheet.rows():
        if row.seen == "not reached":
            print(row)
    print(f"{outcome.count()} in {outcome.seconds:.0f} s; logs in {arguments.work / 'logs'}")
    (arguments.work / "events.json").write_text(json.dumps(dataclasses.asdict(outcome), indent=1), encoding="utf-8")
    if arguments.write:
        events_sheet.replace(arguments.write, outcome)
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
    (llama,) = (specimen for specimen in CATALOGUE if specimen.name == "llama")
    specimen = llama.scaled(arguments.scale or (1 if on_cpu else 16))
    folder, other = (arguments.work.resolve() / name for name in ("model", "other"))
    log = arguments.work / "logs" / "make"
    in_a_process(checkpoints.make, specimen, folder, log=log)
    in_a_process(make_other, specimen, other, log=log)
    starting = threading.Semaphore(arguments.jobs or (2 if on_cpu else 4))
    return Stage(sheet, planner, facts, arguments, folder, other, starting)


def make_other(specimen: Specimen, folder: Path) -> None:
    """The same model with other weights."""
    import transformers

    if (folder / "config.json").exists():
        recipe = (folder / checkpoints.MARKER).read_text(encoding="utf-8")
        if recipe == specimen.recipe():
            return
    model_class = getattr(transformers, specimen.model_class)
    config = model_class.config_class(**specimen.settings)
    checkpoints.save(model_class, config, folder, checkpoints.SEED + 1, device=checkpoints.maker_device())
    (folder / checkpoints.MARKER).write_text(specimen.recipe(), encoding="utf-8")


def _together(stage: Stage, scenarios: Sequence[Callable[[Stage], None]]) -> None:
    with concurrent.futures.ThreadPoolExecutor(len(scenarios)) as pool:
        for future in [pool.submit(scenario, stage) for scenario in scenarios]:
            if error := future.exception():
                print(f"{type(error).__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
