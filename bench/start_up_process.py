"""A start of vLLM in a process of its own with cache directories of its own, and the numbers in its log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.planner import ROOT

#: Numbers in the log, in seconds: those of this benchmark's marks from the start of the process, then vLLM's own.
NUMBERS = {
    "imported_s": r"MARK imported ([\d.]+)",
    "engine_s": r"MARK engine ([\d.]+)",
    "first_token_s": r"MARK first_token ([\d.]+)",
    "model_loading_s": r"Model loading took .*?([\d.]+) seconds",
    "weights_s": r"Loading weights took ([\d.]+)|forked \d+ bytes \(.*?\) in ([\d.]+) s",
    "init_engine_s": r"init engine .*? took ([\d.]+) s",
    "compile_s": r"torch\.compile (?:and initial profiling/warmup run )?(?:took|takes) ([\d.]+) s",
}
#: The first token without the imports, in seconds.
AFTER_IMPORTS = "after_imports_s"
#: Lines of the log that tell which caches vLLM has used.
FLAGS = {
    "aot_loaded": "Directly load AOT compilation",
    "graphs_loaded": "Directly load the compiled graph",
    "plan_applied": "Applying persisted startup plan",
}
_OURS = re.compile(r"RFork.*(?:forked \d|loaded \d|caches|loading from storage|is not a seed|fork failed)")
_DONE, _OFFERS = "MARK tokens", "caches that this worker offers"
_MAX_LINE, _MAX_LINES = 600, 20


def environment(home: Path, device: str, gpu: int, token: str) -> dict[str, str]:
    """The environment of a start whose caches all lie below ``home``."""
    caches = {
        "HOME": home,
        "XDG_CACHE_HOME": home / ".cache",
        "VLLM_CACHE_ROOT": home / ".cache/vllm",
        "TRITON_CACHE_DIR": home / ".triton/cache",
        "CUDA_CACHE_PATH": home / ".nv",
        "FLASHINFER_WORKSPACE_BASE": home,
    }
    on_cpu = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    return {
        **os.environ,
        **{name: str(path) for name, path in caches.items()},
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RFORK_TOKEN": token,
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **(on_cpu if device == "cpu" else {"CUDA_VISIBLE_DEVICES": str(gpu)}),
    }


class Start:
    """One start; its log is the file ``log``."""

    def __init__(self, log: Path, model: Path, llm: Mapping[str, Any], env: Mapping[str, str], *, guard: bool) -> None:
        self.log = log
        Path(env["HOME"]).mkdir(parents=True, exist_ok=True)
        order = {"model": str(model), "llm": llm, "started_at": time.time(), "guard": guard}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.start_up_child", json.dumps(order)],
                env=dict(env),
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, limit_s: float) -> bool:
        """Wait until the tokens are there; False if the process ends before, or ``limit_s`` is over."""
        return self._wait_for(_DONE, limit_s)

    def wait_for_offer(self, limit_s: float) -> bool:
        """Wait until a seed has collected its caches; False if it does not within ``limit_s``."""
        return self._wait_for(_OFFERS, limit_s)

    def _wait_for(self, text: str, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while text not in self.text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                return text in self.text()
            time.sleep(0.1)
        return True

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def end(self, grace_s: float) -> None:
        """End the process and all that it started; it has ``grace_s`` to end by itself."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def numbers(self) -> dict[str, Any]:
        """The numbers in the log so far; see :func:`read_numbers`."""
        return read_numbers(self.text())


def read_numbers(text: str) -> dict[str, Any]:
    """Seconds by the names of :data:`NUMBERS`, the flags of :data:`FLAGS`, the tokens, and this package's lines."""
    found: dict[str, Any] = {}
    for name, pattern in NUMBERS.items():
        matches = [match for match in re.finditer(pattern, text)]
        found[name] = float(next(filter(None, matches[-1].groups()))) if matches else None
    imported_s, first_token_s = found["imported_s"], found["first_token_s"]
    # Imports take from 17 to 30 s on one machine, whatever the row.
    found[AFTER_IMPORTS] = None if first_token_s is None else round(first_token_s - (imported_s or 0.0), 2)
    tokens = re.findall(rf"{_DONE} (.*)", text)
    ours = [line[-_MAX_LINE:] for line in text.splitlines() if _OURS.search(line)]
    return {
        **found,
        **{name: line in text for name, line in FLAGS.items()},
        "tokens": tokens[-1] if tokens else None,
        "lines": ours[:_MAX_LINES],
    }
