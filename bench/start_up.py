"""``make bench-start-up``: process start to first token, without a seed, and forked with and without its caches.

``python -m bench.start_up --model FOLDER`` starts real vLLM with its defaults, one process for each row. It makes the
certificates and the token, and starts the planner. The results are written after each start, as JSON and as a table
with medians. The status is 1 if the tokens of two starts differ, or a start failed. ``bench.start_up_models`` makes
models. On CPU vLLM's compiled forward is loaded with the guard of ``tests/vllm/aot_guard.py``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.start_up_fleet import Fleet
from bench.start_up_process import AFTER_IMPORTS, FLAGS, NUMBERS, Start, environment


@dataclass(frozen=True)
class Row:
    """One kind of start.

    Attributes:
        what: for the table.
        estimate_s: expected duration on one GPU; a row that does not fit into the budget is skipped.
        caches: ``rfork_caches``; None: vLLM's default loader.
        warm: it has the seed's cache root, which the seed has filled; otherwise an empty one of its own.
        other_path: the model has another path than the seed's.
        forks: there is a seed.
    """

    what: str
    estimate_s: float
    caches: str | None = None
    warm: bool = False
    other_path: bool = False
    forks: bool = False


ROWS = {
    "default-cold": Row("default loader, empty caches", 110),
    "default-warm": Row("default loader, warm caches", 50, warm=True),
    "first": Row("first instance with rfork (no seed), warm caches", 50, "code", warm=True),
    "fork-off": Row("fork, empty caches, rfork_caches=off", 108, "off", forks=True),
    "fork-safe": Row("fork, empty caches, rfork_caches=safe", 108, "safe", forks=True),
    "fork-code": Row("fork, empty caches, rfork_caches=code", 60, "code", forks=True),
    "fork-code-path": Row("the same, other model path", 60, "code", other_path=True, forks=True),
    "fork-warm": Row("fork, the seed's own cache root", 50, "code", warm=True, forks=True),
}
#: Expected duration of the seed's start with empty and with warm caches, in seconds.
SEED_S = {False: 115.0, True: 55.0}
#: Bound of one start on a device, in seconds; machines with little memory take minutes on CPU.
LIMIT_S = {"cuda": 200.0, "cpu": 900.0}
#: Longest wait for the seed's list of caches, in seconds.
OFFER_S = 30.0
#: Time in seconds in which a start that has answered may end by itself.
GRACE_S = 6.0
LLM: dict[str, dict[str, Any]] = {
    "cuda": {"skip_tokenizer_init": True, "max_model_len": 2048, "gpu_memory_utilization": 0.5},
    "cpu": {"skip_tokenizer_init": True, "max_model_len": 128, "dtype": "bfloat16"},
}
SHOWN = ("first_token_s", "imported_s", AFTER_IMPORTS, "model_loading_s", "weights_s", "init_engine_s", "compile_s")
#: Console width: the table is Markdown, and nothing may be wrapped.
WIDTH = 320


class StartUp:
    """All rows of one run, on one model.

    Args:
        options: the command's.
        work: a folder for logs, certificates and cache roots.
    """

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options = options
        self._work = work
        self._warm = Path(options.warm) if options.warm else work / "warm"
        self._llm = {**LLM[options.device], **json.loads(options.llm)}
        self._deadline: float = time.monotonic() + options.budget
        self._fleet = Fleet(work)
        self._seed: Start | None = None
        self._seed_is_ready = False
        self.runs: list[dict[str, Any]] = []
        if options.early_seed:
            self._seed = self._launch_seed()

    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._deadline - time.monotonic()

    def run(self, name: str) -> None:
        """Run one row, if it fits into the budget, and add its numbers to :attr:`runs`."""
        row = ROWS[name]
        needs_seed = row.forks or row.warm
        needed_s = row.estimate_s + (SEED_S[self._warm.exists()] if needs_seed and self._seed is None else 0.0)
        if self._options.device == "cuda" and self.left_s() < needed_s:
            self._add(name, {"skipped": f"{self.left_s():.0f} s of the budget are left, and it takes {needed_s:.0f} s"})
            return
        if needs_seed and not self._seed_is_ready:
            self._await_seed()
        home = self._warm if row.warm else self._work / f"home-{len(self.runs)}"
        # A first instance has a key of its own, since there is a seed.
        key = f"start-up-{len(self.runs)}" if name == "first" else "start-up"
        gpu = 0 if self._options.one_gpu else 1
        start = self._launch(name, home, self._path(row), key=key, caches=row.caches, gpu=gpu)
        self._add(name, self._answered(start))
        start.end(GRACE_S)
        if not row.warm:
            shutil.rmtree(home, ignore_errors=True)

    def _launch_seed(self) -> Start:
        return self._launch(
            "seed", self._warm, Path(self._options.model).absolute(), key="start-up", caches="code", gpu=0
        )

    def _await_seed(self) -> None:
        """Wait until the seed has answered and collected its caches; it is the row ``seed``."""
        if self._seed is None:
            self._seed = self._launch_seed()
        numbers = self._answered(self._seed)
        if not self._seed.wait_for_offer(min(OFFER_S, self.left_s())):
            numbers["failed"] = "it did not list its caches"
        self._seed_is_ready = True
        self._add("seed", numbers)

    def _launch(self, name: str, home: Path, model: Path, *, key: str, caches: str | None, gpu: int) -> Start:
        """Start one process; ``caches`` None: with vLLM's default loader."""
        llm = dict(self._llm)
        if caches is not None:
            extra = self._fleet.options(key, caches, self._options.engine)
            llm |= {"load_format": "rfork", "model_loader_extra_config": extra}
        env = environment(home, self._options.device, gpu, self._fleet.token)
        log = self._work / f"{len(self.runs):02d}-{name}.log"
        return Start(log, model, llm, env, guard=self._options.device == "cpu")

    def _answered(self, start: Start) -> dict[str, Any]:
        """Wait for the tokens of ``start``; returns its numbers."""
        done = start.wait(min(LIMIT_S[self._options.device], self.left_s()))
        numbers = start.numbers()
        if not done:
            numbers |= {"failed": "no tokens in time", "log": start.text()[-3000:]}
        return numbers

    def _path(self, row: Row) -> Path:
        model = Path(self._options.model).absolute()
        if not row.other_path:
            return model
        other = self._work / f"model-{len(self.runs)}"
        other.mkdir()
        for file in model.iterdir():
            (other / file.name).symlink_to(file)
        return other

    def _add(self, name: str, numbers: dict[str, Any]) -> None:
        self.runs.append({"row": name, **numbers})
        print(
            json.dumps(
                {
                    "row": name,
                    **{key: numbers.get(key) for key in (*NUMBERS, AFTER_IMPORTS, *FLAGS, "skipped", "failed")},
                }
            )
        )
        self.write()

    def summary(self) -> dict[str, Any]:
        """The results as plain data, with the median of each row and the targets."""
        rows = medians(self.runs)
        answered = [run["tokens"] for run in self.runs if run.get("tokens")]
        return {
            "model": self._options.model,
            "llm": self._llm,
            "one_gpu": self._options.one_gpu,
            "tokens_equal": len(set(answered)) <= 1,
            "median": rows,
            "targets": targets(rows),
            "runs": self.runs,
        }

    def write(self) -> None:
        """Write the results so far, and the logs beside them."""
        out = Path(self._options.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(self.summary(), indent=1))
        with tarfile.open(out.with_suffix(".logs.tgz"), "w:gz") as archive:
            for log in sorted(self._work.glob("*.log")):
                archive.add(log, log.name)

    def stop(self) -> None:
        """End the seed and the planner."""
        if self._seed is not None:
            self._seed.end(GRACE_S)
        self._fleet.stop()
        self.write()


def medians(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The median of each number by row, the number of runs that answered, and the caches that all of them used."""
    rows: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["row"] for run in runs):
        answered = [run for run in runs if run["row"] == name and run.get("tokens")]
        if answered:
            known = {key: [run[key] for run in answered if run[key] is not None] for key in (*NUMBERS, AFTER_IMPORTS)}
            rows[name] = {key: round(statistics.median(values), 2) for key, values in known.items() if values}
            rows[name]["used"] = [flag for flag in FLAGS if all(run[flag] for run in answered)]
            rows[name]["runs"] = len(answered)
    return rows


def targets(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The longest that a fork with code may take: 1.05 times a warm start without its weights, half a cold one."""
    cold, warm = rows.get("default-cold"), rows.get("default-warm")
    found: dict[str, float] = {}
    if warm and "weights_s" in warm:
        found["warm_without_weights_s"] = round(1.05 * (warm["first_token_s"] - warm["weights_s"]), 2)
    if cold:
        found["half_of_cold_s"] = round(cold["first_token_s"] / 2, 2)
    reached: dict[str, Any] = {
        name: rows[name]["first_token_s"] <= min(found.values())
        for name in ("fork-code", "fork-code-path", "fork-warm")
        if found and name in rows
    }
    return {**found, **reached}


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """The medians of :func:`medians` as Markdown."""
    shown = Table("start", "runs", *(name.removesuffix("_s") for name in SHOWN), "caches used", box=box.MARKDOWN)
    for name, row in rows.items():
        cells = (f"{row[key]:.2f}" if key in row else "–" for key in SHOWN)
        what = ROWS[name].what if name in ROWS else name
        shown.add_row(what, str(row["runs"]), *cells, ", ".join(row["used"]) or "–")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if tokens differ or a start failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--out", default="build/bench/start_up.json")
    parser.add_argument("--rows", default=",".join(ROWS), help="in this order; a name may be repeated for a median")
    parser.add_argument("--repeat", type=int, default=1, help="times that all rows are run")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; rows that do not fit are skipped")
    parser.add_argument("--device", choices=sorted(LLM), default="cuda")
    parser.add_argument("--one-gpu", action="store_true", help="seed and receivers share one GPU")
    parser.add_argument("--early-seed", action="store_true", help="start the seed beside the first row, to save time")
    parser.add_argument("--engine", default="auto", help="rfork_engine")
    parser.add_argument("--llm", default="{}", help="more of vLLM's engine arguments, as JSON")
    parser.add_argument("--warm", help="cache root of the seed and the warm rows, which is kept; default: a new one")
    options = parser.parse_args(arguments)
    if options.early_seed and options.one_gpu:
        parser.error("--early-seed needs a second GPU: vLLM counts what others take while it measures its memory")
    work = Path(tempfile.mkdtemp(prefix="start-up-"))
    run = StartUp(options, work)
    try:
        for _ in range(options.repeat):
            for name in options.rows.split(","):
                run.run(name)
    finally:
        run.stop()
        shutil.rmtree(work, ignore_errors=True)
    summary = run.summary()
    Console(width=WIDTH, markup=False).print(table(summary["median"]))
    print(json.dumps({"tokens_equal": summary["tokens_equal"], "targets": summary["targets"]}))
    return int(not summary["tokens_equal"] or any("failed" in each for each in run.runs))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the starts have sessions of their own, and must end as well
    sys.exit(main())
