"""``python -m zoo``: fork every model of the catalogue with pytest, and write the table.

Arguments that this command does not know are pytest's, such as ``-k`` and ``-x``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo import results
from zoo.case import from_file
from zoo.catalogue import CATALOGUE
from zoo.planner import ROOT
from zoo.plugin import Models, add_options, run_pytest


def main() -> int:
    """Run what was asked for; 0 if everything came as expected."""
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__, allow_abbrev=False)
    add_options(parser, ROOT / "build" / "zoo")
    parser.add_argument("--only", default="", help="names, separated by commas; default: all")
    parser.add_argument("--models", type=Path, help="JSON file of more models, made like those of the catalogue")
    parser.add_argument("--scale", type=int, default=1, help="how many times as wide every model is made")
    parser.add_argument("--list", action="store_true", help="list the models and end")
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="ZOO_JSON", help="run nothing: show what earlier runs found"
    )
    arguments, more = parser.parse_known_args()

    if arguments.render:
        outcome = results.merged([results.load(path) for path in arguments.render])
        print(results.table(outcome))
        if arguments.write:
            results.replace(arguments.write, outcome)
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
    return run_pytest("test_models.py", Models([case.scaled(arguments.scale) for case in cases], arguments), more)


if __name__ == "__main__":
    sys.exit(main())
