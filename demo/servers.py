"""The planner and `vllm serve` in the demo: commands, environments, ports and readiness."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from demo import milestones, throttle
from demo.processes import DemoError, Process, free_port

ROOT = Path(__file__).resolve().parent.parent
STANDIN = ROOT / "build" / "standin"
SERVED_NAME = "demo"
#: A server is ready within a minute on two idle cores. Machines are busy, and a first start compiles Python.
READY_DEADLINE_S = 600.0
PLANNER_DEADLINE_S = 60.0
#: The programs that serve a model: vLLM's own command, and the same with throttled storage.
VLLM = (str(Path(sys.executable).with_name("vllm")),)
THROTTLED_VLLM = (sys.executable, "-m", "demo.throttled_server")


def is_up(url: str) -> bool:
    """Return True if an HTTP GET is answered with 200 at once."""
    try:
        return httpx.get(url, timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


class Planner:
    """A planner of this package, as its users start it."""

    def __init__(self, process: Process, url: str) -> None:
        self.process = process
        self.url = url

    def seeds(self) -> set[str]:
        """The ip:port:rank of every seed that the planner may still grant: known, not draining and not absent."""
        try:
            answer = httpx.get(f"{self.url}/debug/snapshot", timeout=30.0, trust_env=False)
            seeds = answer.raise_for_status().json()["seeds"]
            granted = [seed for seed in seeds if not (seed.get("draining") or seed.get("absent"))]
            return {"{ip}:{port}:{rank}".format_map(seed) for seed in granted}
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise DemoError(f"the planner did not return its snapshot: {error!r}") from error

    def wait_without(self, seed: str, deadline_s: float = 90.0) -> float:
        """Wait until the planner does not grant ``seed`` any more; returns the seconds it took."""
        return self.process.wait_until(f"the end of {seed}", lambda: seed not in self.seeds(), deadline_s)


@contextmanager
def planner(logs: Path) -> Iterator[Planner]:
    """The planner of the package, ready."""
    port = free_port()
    command = [sys.executable, "-m", "vllm_rfork.cli.main", "planner", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with Process("planner", command, os.environ, logs / "planner.log") as process:
        process.wait_until("answering", lambda: is_up(f"{url}/healthz"), PLANNER_DEADLINE_S)
        yield Planner(process, url)


class Server:
    """One `vllm serve` that is ready."""

    def __init__(self, process: Process, url: str, ready_s: float) -> None:
        self.process = process
        self.url = url
        self.ready_s = ready_s

    def own_seed(self) -> str:
        """Wait until the server has announced itself as a seed; returns its ip:port:rank."""
        self.process.wait_until(
            "becoming a seed", lambda: milestones.announced(self.process.text()) is not None, deadline_s=120
        )
        seed = milestones.announced(self.process.text())
        if seed is None:
            raise DemoError(f"{self.process.log} was cut while it was read")
        return seed


def cores(slot: int) -> str:
    """The cores of one of two servers that run side by side: half of this process's own, at most eight.

    Both halves have the same size: the number of threads determines the order in which numbers are added up.
    """
    own = sorted(os.sched_getaffinity(0))
    each = max(1, min(8, len(own) // 2))
    return ",".join(str(own[(slot * each + index) % len(own)]) for index in range(each))


def environment(slot: int, engine: str) -> dict[str, str]:
    """The environment of a server: bounded memory, its own cores, no hub, and the stand-in for an Ascend engine."""
    env = dict(os.environ)
    env |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": cores(slot),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
    }
    # Settings of the caller's own deployment must not affect the demo.
    for name in ("MODEL_URL", "MODEL_DEPLOY_STRATEGY_NAME", "RFORK_SCHEDULER_URL", "VLLM_PLUGINS"):
        env.pop(name, None)
    if engine == "yuanrong":
        env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(STANDIN), env.get("LD_LIBRARY_PATH", "")]))
        env["TRANSFER_ENGINE_P2P_SO_PATH"] = str(STANDIN / "libp2p_standin.so")
    return env


def rfork_options(planner_url: str, engine: str, mb_per_s: float | None = None) -> list[str]:
    """The arguments of docs/options.md, for this machine only; ``mb_per_s`` throttles storage."""
    config: dict[str, Any] = {
        "model_url": "demo-model",
        "model_deploy_strategy_name": "demo",
        "rfork_scheduler_url": planner_url,
        "rfork_engine": engine,
        "rfork_seed_bind_host": "127.0.0.1",
        "rfork_seed_advertise_host": "127.0.0.1",
    }
    if mb_per_s is not None:
        config |= {"rfork_fallback_load_format": throttle.FORMAT, throttle.RATE: mb_per_s}
    return ["--load-format", "rfork", "--model-loader-extra-config", json.dumps(config)]


@contextmanager
def server(
    name: str,
    model: Path,
    *,
    slot: int,
    engine: str,
    load_options: Sequence[str],
    logs: Path,
    program: Sequence[str] = VLLM,
) -> Iterator[Server]:
    """`vllm serve` on ``model``, ready; its whole tree is ended on the way out."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *program,
        *("serve", str(model)),
        *("--served-model-name", SERVED_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "4"),
        *("--seed", "0", "--enforce-eager", "--no-enable-prefix-caching"),
        *load_options,
    ]
    with Process(f"server {name}", command, environment(slot, engine), logs / f"{name}.log") as process:
        ready_s = process.wait_until("becoming ready", lambda: is_up(f"{url}/health"), READY_DEADLINE_S)
        yield Server(process, url, ready_s)
