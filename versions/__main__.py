"""``make versions``: read the releases from the package index, record them, and report what they lack."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

from versions import releases, table
from versions.check import complaints, number
from versions.source import Module

RECORDED = Path(__file__).parent / "recorded"
#: The releases by package, for ``vllm-rfork doctor``.
TESTED = Path(__file__).parents[1] / "vllm_rfork" / "cli" / "tested.json"

#: Exact releases.
RELEASES = {
    table.VLLM: ("0.17.0", "0.18.1", "0.20.2", "0.23.0", "0.26.0", "0.30.0", "0.32.0"),
    table.ASCEND: ("0.18.0", "0.23.0"),
}
#: Packages whose newest release is read as well.
FOLLOWED = (table.VLLM,)


def records() -> list[dict[str, Any]]:
    """The recorded releases, oldest first."""
    found = [json.loads(file.read_text()) for file in RECORDED.glob("*.json")]
    return sorted(found, key=lambda record: (record["package"], number(record["version"])))


def record(wheel: releases.Wheel) -> dict[str, Any]:
    """Read the interfaces in the table from ``wheel``."""
    sources = releases.Sources(wheel)

    @functools.cache
    def module(name: str) -> Module | None:
        text = sources.text(name)
        return None if text is None else Module(text)

    symbols: dict[str, Any] = {}
    rows = (*table.ROWS, *table.ELSEWHERE)
    with_calls = {row.key for row in rows if row.calls}
    for row in rows:
        if row.package == wheel.package:
            found = module(row.module)
            here = {"kind": "module"} if found is not None else None
            here = here if found is None or not row.symbol else found.describe(row.symbol)
            if here is not None and row.key not in with_calls:
                here.pop("calls", None)  # hundreds of names that nothing compares
            symbols[row.key] = here
    fields: dict[str, Any] = {}
    if wheel.package == table.VLLM:
        for section, (name, cls) in table.CONFIGURATIONS.items():
            found = module(name)
            fields[section] = None if found is None else found.fields(cls)
    workers: dict[str, Any] = {}
    for name, cls in table.WORKERS[wheel.package]:
        found = module(name)
        workers[cls] = None if found is None else found.methods(cls)
    name, mapping = table.ENVIRONMENT[wheel.package]
    found = module(name)
    return {
        "package": wheel.package,
        "version": wheel.version,
        "file": wheel.file,
        "sha256": wheel.sha256,
        "symbols": symbols,
        "fields": fields,
        "workers": workers,
        "environment": None if found is None else found.keys(mapping),
    }


def tested() -> dict[str, list[str]]:
    """Package → the recorded releases, oldest first."""
    found: dict[str, list[str]] = {}
    for each in records():
        found.setdefault(each["package"], []).append(each["version"])
    return found


def refetch() -> None:
    """Read and record every release again."""
    for package, wanted in RELEASES.items():
        there = releases.wheels(package)
        final = [version for version in there if version.replace(".", "").isdigit()]
        newest = (max(final, key=number),) if package in FOLLOWED else ()
        for old in RECORDED.glob(f"{package}-[0-9]*.json"):
            if old.stem.removeprefix(f"{package}-") not in (*wanted, *newest):
                old.unlink()
        for version in dict.fromkeys((*wanted, *newest)):
            if version not in there:
                raise releases.ReleaseError(f"the index has no wheel of {package} {version}")
            print(f"reading {there[version].file}", flush=True)
            text = json.dumps(record(there[version]), indent=1)
            (RECORDED / f"{package}-{version}.json").write_text(text + "\n")
    TESTED.write_text(json.dumps(tested(), indent=1) + "\n")


def main() -> None:
    """Refetch and check, or with ``--recorded`` only check. Exit status 1 if a release lacks something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recorded", action="store_true", help="check the recorded releases without the index")
    if not parser.parse_args().recorded:
        RECORDED.mkdir(exist_ok=True)
        refetch()
    wrong = []
    for recorded in records():
        found = complaints(recorded, (*table.ROWS, *table.ELSEWHERE))
        print(f"{recorded['package']} {recorded['version']}: {'; '.join(found) or 'complete'}")
        wrong += found
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
