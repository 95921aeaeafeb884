"""``python -m zoo.events``: scenarios in the lives of seeds and receivers, on real engines of any platform.

Sleep mode, expandable segments, reloads, updates, cache resets, old epochs, a seed killed while it is read, an altered
byte, and the memory that a fork needs. pytest reports each check of ``scenario_results.CHECKS``; at the end, one line
each has its name, what is expected, what was seen, and ``ok``, ``FAILED`` or ``not here``.

Each engine is a process of its own (``zoo.scenario_worker``); independent ones start at the same time. Arguments that
this command does not know are pytest's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo import scenario_results
from zoo.planner import ROOT
from zoo.plugin import Events, add_options, run_pytest


def main() -> int:
    """Run every scenario; 0 if no check has failed."""
    parser = argparse.ArgumentParser(prog="python -m zoo.events", description=__doc__, allow_abbrev=False)
    add_options(parser, ROOT / "build" / "events")
    parser.set_defaults(timeout=120.0)
    parser.add_argument("--scale", type=int, help="how many times as wide the model is made; default: 16, on CPU 1")
    parser.add_argument("--render", type=Path, metavar="EVENTS_JSON", help="run nothing: show what a run found")
    arguments, more = parser.parse_known_args()
    if arguments.render:
        outcome = scenario_results.load(arguments.render)
        print(scenario_results.table(outcome))
        if arguments.write:
            scenario_results.replace(arguments.write, outcome)
        return 0
    return run_pytest("test_events.py", Events(arguments), more)


if __name__ == "__main__":
    sys.exit(main())
