"""``make bench-engines``: every engine of this machine in one run, as tables and in ``build/bench/engines.json``.

Two processes without vLLM: one has the tensors of a model, the other one reads them through the engine port. So an
engine appears here as soon as it is registered and its package is installed, in this environment or in ``.venv-NAME``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.engine_deaths import deaths
from bench.engine_pair import Failed, Pair, Setting, Unavailable, setting_of
from vllm_rfork.engines.registry import engine_class, engine_names

OUT = Path("build/bench/engines.json")
#: Columns of the printed tables, which are Markdown: nothing may be wrapped.
WIDTH = 320
#: Bytes of all tensors together, in GiB.
GIB = {"cpu": 1.0, "cuda": 14.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if an engine that is installed failed."""
    options = _options(arguments)
    devices = _devices(options.device)
    nbytes = int((options.gib or GIB[options.device]) * 2**30)
    counts = [int(count) for count in options.tensors.split(",")]
    console = Console(width=WIDTH, markup=False)
    results: dict[str, dict[str, Any]] = {}
    for name in options.engines.split(",") if options.engines else _engines(options.device):
        setting = setting_of(name, options.device, *devices)
        console.print(f"{name} …")
        results[name] = measured(setting, [] if options.only_deaths else counts, nbytes, options.passes)
        if not options.no_deaths and "unavailable" not in results[name]:
            results[name]["deaths"] = deaths(setting, nbytes)
        _write(options, nbytes, results)
    for table in (rows(results), death_rows(results)):
        console.print(table)
    return int(any("failed" in row for result in results.values() for row in result.get("tensors", {}).values()))


def measured(setting: Setting, counts: Sequence[int], nbytes: int, passes: int) -> dict[str, Any]:
    """All measurements of one engine, by number of tensors; ``unavailable`` with the reason if there are none."""
    device_type = setting.device.partition(":")[0]
    if device_type not in engine_class(setting.engine).device_types:
        return {"note": setting.note, "unavailable": f"it does not read memory of type {device_type}"}
    result: dict[str, Any] = {"note": setting.note, "tensors": {}}
    for count in counts:
        try:
            with Pair(setting, count, nbytes) as pair:
                result["tensors"][str(count)] = _measured(pair, passes)
        except Unavailable as error:
            return {"note": setting.note, "unavailable": str(error)}
        except Failed as error:
            result["tensors"][str(count)] = {"failed": str(error)}
    return result


def _measured(pair: Pair, passes: int) -> dict[str, Any]:
    """One row: a first pass into memory that nobody has touched, then ``passes`` more."""
    seed = pair.publish()
    receiver, row = pair.receiver()
    nbytes = sum(length for _, length in pair.published["regions"])
    devices = pair.setting.seed_device, pair.setting.device
    first = receiver.call("read")
    right = receiver.call("is_right")
    seeds_cpu_s = seed.call("usage", device=devices[0])["cpu_s"]
    again = [receiver.call("read") for _ in range(passes)]
    used = [side.call("usage", device=device) for side, device in zip((seed, receiver), devices, strict=True)]
    right = receiver.call("is_right") and right
    receiver.call("close")
    raw = receiver.call("raw", source=seed.call("raw_source", device=devices[0], nbytes=nbytes))
    seconds = statistics.median(each["seconds"] for each in again)
    gb = nbytes / 1e9
    row |= {
        "open_s": pair.opened,
        "seed_register_s": pair.published["seconds"],
        "endpoint_characters": len(pair.published["endpoint"]),
        "nbytes": nbytes,
        "first_gb_per_s": gb / first["seconds"],
        "gb_per_s": gb / seconds,
        "raw_gb_per_s": raw,
        "of_raw": gb / seconds / raw["touched"],
        "cpu_s_per_gb": {
            "seed": (used[0]["cpu_s"] - seeds_cpu_s) / passes / gb,
            "receiver": statistics.median(each["cpu_s"] for each in again) / gb,
        },
        "peak_nbytes": {"seed": used[0]["peak_nbytes"], "receiver": used[1]["peak_nbytes"]},
        "device_nbytes": {"seed": used[0]["device_nbytes"], "receiver": used[1]["device_nbytes"]},
    }
    if "fresh" in raw:
        row["first_of_raw"] = row["first_gb_per_s"] / raw["fresh"]
    if not right:
        row["failed"] = "the bytes that arrived are not the seed's"
    return row


def rows(results: dict[str, dict[str, Any]]) -> Table:
    """The table of costs; in pairs the seed's side is first."""
    titles = ("engine, lane", "tensors", "open ms", "register ms", "connect ms", "first GB/s (of raw)", "GB/s (of raw)")
    table = Table(*titles, "CPU s/GB, seed and receiver", "MB above the tensors", box=box.MARKDOWN)
    for name, result in results.items():
        if "unavailable" in result:
            table.add_row(name, "", result["unavailable"])
        for count, row in result.get("tensors", {}).items():
            if "failed" in row:
                table.add_row(name, count, row["failed"])
                continue
            first_of_raw = f" ({row['first_of_raw']:.2f})" if "first_of_raw" in row else ""
            memory = [f"{row['peak_nbytes'][side] / 1e6:.0f}" for side in ("seed", "receiver")]
            table.add_row(
                row["lane"] + (" *" if result["note"] else ""),
                count,
                " / ".join(f"{row['open_s'][side] * 1e3:.0f}" for side in ("seed", "receiver")),
                f"{row['seed_register_s'] * 1e3:.1f} / {row['register_s'] * 1e3:.1f}",
                f"{row['connect_s'] * 1e3:.1f}",
                f"{row['first_gb_per_s']:.2f}{first_of_raw}",
                f"{row['gb_per_s']:.2f} ({row['of_raw']:.2f})",
                " / ".join(f"{row['cpu_s_per_gb'][side]:.3f}" for side in ("seed", "receiver")),
                " / ".join(memory),
            )
    notes = [f"* {name}: {result['note']}" for name, result in results.items() if result["note"]]
    table.caption = "\n".join(notes) or None
    return table


def death_rows(results: dict[str, dict[str, Any]]) -> Table:
    """The table of disturbances."""
    table = Table("engine", "in the middle of reads", "outcome", box=box.MARKDOWN)
    for name, result in results.items():
        for event, outcome in result.get("deaths", {}).items():
            table.add_row(name, event, outcome)
    return table


def _engines(device_type: str) -> list[str]:
    """The engines that read memory of this type, or that have a stand-in which does."""
    return [name for name in engine_names() if device_type in engine_class(name).device_types]


def _devices(device_type: str) -> tuple[str, str]:
    """The seed's and the receiver's device: the first and the last one."""
    if device_type == "cpu":
        return "cpu", "cpu"
    import torch

    return "cuda:0", f"cuda:{torch.cuda.device_count() - 1}"


def _write(options: argparse.Namespace, nbytes: int, results: dict[str, dict[str, Any]]) -> None:
    """Write what there is after each engine, so that a run that is cut short leaves something."""
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}
    if options.device == "cuda":
        import torch

        machine |= {"gpu": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count(), "torch": torch.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"date": date.today().isoformat(), "device": options.device, "nbytes": nbytes, "machine": machine}
    options.out.write_text(json.dumps({**report, "engines": results}, indent=1))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.engines", description=__doc__)
    parser.add_argument("--device", choices=sorted(GIB), default="cpu")
    parser.add_argument("--gib", type=float, help="bytes of all tensors together, in GiB: 1 on cpu, 14 on cuda")
    parser.add_argument("--engines", help="names, separated by commas; all that suit the device if not given")
    parser.add_argument("--tensors", default="2000,100000", help="numbers of tensors, separated by commas")
    parser.add_argument("--passes", type=int, default=3, help="counted reads of everything, after a first one")
    parser.add_argument("--no-deaths", action="store_true", help="do not kill or stop any process")
    parser.add_argument("--only-deaths", action="store_true", help="measure no rates, only kill and stop")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
