"""Profile of a load by stages: the default loader, the first instance with rfork, which finds no seed, and a fork.

``python -m bench.load_profile --model FOLDER`` on any platform that vLLM serves on; prints a table, and one JSON line
at the end. Each row is a process of its own. All of them import vLLM first and then start one after the other, so that
none is measured beside another's imports. ``--root LABEL=FOLDER`` measures other checkouts in the same run, in turns.
A row is ``default``, ``first`` or ``fork``, and the last two may name an engine: ``fork:nixl``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.ending import end
from bench.load_stages import INIT_DEVICE, LOAD, OTHER, SAME, STAGES, WALK
from zoo.planner import Planner

HERE = Path(__file__).resolve().parents[1]
_LOADING = re.compile(r"Model loading took .*? ([\d.]+) seconds")
_ORDER = (*STAGES, WALK, *SAME, OTHER)


@dataclass(frozen=True)
class Row:
    """One row: ``label`` names the checkout at ``root``; ``kind`` and ``engine`` are explained in the module."""

    label: str
    root: Path
    kind: str
    engine: str

    @property
    def name(self) -> str:
        """``before fork:nixl``; ``default`` for the loader that no checkout changes."""
        return "default" if self.kind == "default" else f"{self.label} {self.kind}:{self.engine}"


class Child:
    """The process of one row."""

    def __init__(self, row: Row, given: argparse.Namespace, planner_url: str, logs: Path, number: int) -> None:
        self.row = row
        self.log = logs / f"{row.name.replace(' ', '-').replace(':', '-')}-{number}.log"
        self._log = self.log.open("w")
        calls = {"calls": str(self.log.with_suffix(".pstats"))} if given.calls else {}
        setting = {
            "llm": _llm(row, given, planner_url),
            "is_seed": row.kind == "first",
            "runtime": given.runtime,
            **calls,
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "bench" / "load_stages.py"), json.dumps(setting)],
            cwd=row.root,
            env=_environment(row, given),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def answer(self) -> dict[str, Any]:
        """The next line that is for us.

        Raises:
            RuntimeError: the process has ended.
        """
        for line in self._process.stdout or ():
            if line.startswith("PROFILE "):
                return dict(json.loads(line.removeprefix("PROFILE ")))
            self._log.write(line)
            self._log.flush()
        raise RuntimeError(f"{self.row.name} has ended; its log is {self.log}")

    def start(self) -> dict[str, Any]:
        """Let it start vLLM; returns its profile."""
        if self._process.stdin is None:
            raise RuntimeError("the process was started without pipes")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self.answer()
        self._log.flush()
        shown = _LOADING.findall(self.log.read_text())
        return {**answer, "model_loading_s": float(shown[0]) if shown else None}

    def end(self) -> None:
        """Let it withdraw its seed and exit."""
        end(self._process)
        self._log.close()


def _llm(row: Row, given: argparse.Namespace, planner_url: str) -> dict[str, Any]:
    """vLLM's engine arguments for ``row``."""
    arguments: dict[str, Any] = {
        "model": str(given.model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "bfloat16",
        "max_model_len": 512,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 1 << 30,
        **json.loads(given.llm),
    }
    if row.kind != "default":
        arguments["load_format"] = "rfork"
        arguments["model_loader_extra_config"] = {
            "model_url": f"profile-{row.label}-{row.engine}",
            "model_deploy_strategy_name": "bench",
            "rfork_scheduler_url": planner_url,
            "rfork_seed_advertise_host": "127.0.0.1",
            "rfork_engine": row.engine,
            **json.loads(given.options),
        }
    return arguments


def _environment(row: Row, given: argparse.Namespace) -> dict[str, str]:
    """The environment of ``row``: seeds get the first GPU, the others the last one."""
    gpus = given.gpus.split(",")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(row.root), os.environ.get("PYTHONPATH", "")))),
        "PYTHONSAFEPATH": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "CUDA_VISIBLE_DEVICES": gpus[0] if row.kind == "first" else gpus[-1],
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _rows(given: argparse.Namespace) -> list[Row]:
    """The default loader's row first, then those of each checkout; a seed comes before its fork."""
    roots = [(label, Path(path).resolve()) for label, _, path in (root.partition("=") for root in given.root)]
    wanted = [
        (kind, engine or given.engine) for kind, _, engine in (row.partition(":") for row in given.rows.split(","))
    ]
    rows = [Row(label, root, kind, engine) for label, root in roots for kind, engine in wanted if kind != "default"]
    default = [Row("", roots[-1][1], "default", "")] if any(kind == "default" for kind, _ in wanted) else []
    return default + rows


def measure(given: argparse.Namespace, logs: Path) -> dict[str, list[dict[str, Any]]]:
    """The profiles of every row, by its name.

    Raises:
        RuntimeError: a process ended early, or its tokens differ from the first one's.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    planner = Planner()
    try:
        for number in range(given.repeat):
            children = [Child(row, given, planner.url, logs, number) for row in _rows(given)]
            try:
                for child in children:
                    child.answer()
                for place, child in enumerate(children):
                    found.setdefault(child.row.name, []).append(child.start())
                    if child.row.kind != "first":  # its seed is not needed any more, either
                        for each in children[: place + 1]:
                            each.end()
            finally:
                for child in children:
                    child.end()
    finally:
        planner.stop()
    tokens = {json.dumps(took["tokens"]) for each in found.values() for took in each}
    if len(tokens) > 1:
        raise RuntimeError(f"the rows answer with different tokens: {', '.join(sorted(tokens))}; see {logs}")
    return found


def summary(profiles: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one row; counts are those of its first start."""

    def medians(key: str) -> dict[str, float]:
        names = dict.fromkeys(name for profile in profiles for name in profile[key])
        return {name: statistics.median(profile[key].get(name, 0.0) for profile in profiles) for name in names}

    shown = [profile["model_loading_s"] for profile in profiles if profile["model_loading_s"] is not None]
    return {
        "load_s": statistics.median(profile["load_s"] for profile in profiles),
        "all_load_s": sorted(profile["load_s"] for profile in profiles),
        "engine_s": statistics.median(profile["engine_s"] for profile in profiles),
        "model_loading_s": statistics.median(shown) if shown else None,
        "seconds": medians("seconds"),
        "cpu_seconds": medians("cpu_seconds"),
        "counts": profiles[0]["counts"],
        "collections": profiles[0]["collections"],
    }


def show(rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Print seconds by stage, each with its processor time, and the number of walks and collections."""
    table = Table("stage, s (CPU s)", *rows)
    table.add_row(LOAD, *(f"{row['load_s']:.3f}" for row in rows.values()), style="bold")
    table.add_row("Model loading took", *(str(row["model_loading_s"] or "") for row in rows.values()))
    for stage in (*_ORDER, INIT_DEVICE):
        if any(stage in row["seconds"] for row in rows.values()):
            cells = (
                f"{row['seconds'][stage]:.3f} ({row['cpu_seconds'][stage]:.3f})" if stage in row["seconds"] else ""
                for row in rows.values()
            )
            table.add_row(f"{stage}, before the load" if stage == INIT_DEVICE else stage, *cells)
    for what in ("walk", "leaves", "digest", "describe"):
        table.add_row(f"number: {what}", *(str(row["counts"].get(what, 0)) for row in rows.values()))
    for what in sorted({name for row in rows.values() for name in row["collections"]["counts"]}):
        of = [
            (row["collections"]["counts"].get(what, 0), row["collections"]["seconds"].get(what, 0.0))
            for row in rows.values()
        ]
        table.add_row(f"collections, {what}", *(f"{count} in {seconds:.3f} s" for count, seconds in of))
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--root", action="append", help="LABEL=FOLDER: a checkout to measure; this one if not given")
    parser.add_argument("--rows", default="default,first,fork")
    parser.add_argument("--engine", default="auto", help="rfork_engine of rows that name none")
    parser.add_argument("--repeat", type=int, default=1, help="starts of each row; medians are printed")
    parser.add_argument("--gpus", default="0,1", help="GPU of the seeds, and GPU of the other rows")
    parser.add_argument("--llm", default="{}", help="more of vLLM's engine arguments, as JSON")
    parser.add_argument("--options", default="{}", help="more of the loader's options, as JSON")
    parser.add_argument("--runtime", action="store_true", help="on a CPU: the layout and the steps of an accelerator")
    parser.add_argument("--calls", action="store_true", help="also profile every Python call, which slows all of them")
    parser.add_argument("--logs", type=Path, help="folder for the logs; a temporary one if not given")
    given = parser.parse_args()
    given.root = given.root or [f"this={HERE}"]
    logs = given.logs or Path(tempfile.mkdtemp(prefix="load-profile-"))
    logs.mkdir(parents=True, exist_ok=True)
    rows = {name: summary(profiles) for name, profiles in measure(given, logs).items()}
    show(rows, Console(width=200))
    print(json.dumps({"logs": str(logs), "rows": rows}))


if __name__ == "__main__":
    main()
