"""``make bench``: cost and gain of a fork on this machine, as tables and in ``build/bench/bench.json``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import checkpoint, memory, weights

#: Stages whose cost does not depend on the size of the weights.
FIXED = ("planner", "metadata", "pairing", "registration", "connect", "epoch")
OUT = Path("build/bench")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each loader, interleaved")
    parser.add_argument("--memory-nbytes", type=int, default=1 << 30)
    arguments = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    console = Console()
    model, many = OUT / "model-large", OUT / "model-many"
    nbytes = checkpoint.write(model, checkpoint.LARGE)
    checkpoint.write(many, checkpoint.MANY)
    console.print(
        f"{os.cpu_count()} cores; checkpoint of {nbytes / 1e9:.2f} GB in page cache; {arguments.runs} runs each"
    )

    machine = memory.rates(arguments.memory_nbytes, arguments.runs)
    phase = weights.interleaved(model, OUT, arguments.runs)
    fixed = weights.interleaved(many, OUT, arguments.runs)
    peak = weights.peaks(model, OUT)

    default_s = phase["default"]["seconds"]
    table = Table("weights phase", "seconds", "GB/s", "times the default loader", "of memcpy", "slowest and fastest")
    for name, row in phase.items():
        table.add_row(
            "default loader" if name == "default" else f"fork, {name}",
            f"{row['seconds']:.3f}",
            f"{row['gb_per_s']:.2f}",
            f"{default_s / row['seconds']:.2f}",
            f"{row['gb_per_s'] / machine['memcpy']:.2f}",
            f"{row['all_seconds'][-1]:.3f} … {row['all_seconds'][0]:.3f}",
        )
    console.print(table)

    table = Table(
        "stage, median seconds", *(f"{name}, {size}" for size in ("large", "2000 tensors") for name in weights.ENGINES)
    )
    for stage in phase[weights.ENGINES[0]]["stages"]:
        cells = [f"{rows[name]['stages'].get(stage, 0):.3f}" for rows in (phase, fixed) for name in weights.ENGINES]
        table.add_row(stage + (" (overlaps construction)" if stage == "engine" else ""), *cells)
    sums = [sum(rows[n]["stages"].get(s, 0) for s in FIXED) for rows in (phase, fixed) for n in weights.ENGINES]
    table.add_row("fixed costs: " + ", ".join(FIXED), *(f"{value:.3f}" for value in sums), style="bold")
    console.print(table)

    table = Table("host memory", "GB/s", "of memcpy", "times as long as a plain sum")
    for name, rate in machine.items():
        threads = name.partition(", ")[2]
        plain = machine["plain sum, " + threads if threads else "plain sum"]
        table.add_row(name, f"{rate:.2f}", f"{rate / machine['memcpy']:.2f}", f"{plain / rate:.2f}")
    console.print(table)

    table = Table("peak memory of a load", "GB", "over the default loader")
    for name, value in peak.items():
        table.add_row(name, f"{value / 1e9:.2f}", f"{(value - peak['default loader']) / 1e9:+.2f}")
    console.print(table)

    results = {"weights": phase, "many_tensors": fixed, "memory": machine, "peak_nbytes": peak, "runs": arguments.runs}
    (OUT / "bench.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
