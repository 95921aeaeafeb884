"""One worker process of the benchmark: loads the model on each order and reports the seconds.

Orders arrive as JSON lines on standard input; answers are lines that begin with ``BENCH``. Only ``load_weights`` is
timed, because what precedes and follows it is the same with and without a fork.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any


def peak_rss_nbytes() -> int:
    """Peak resident size of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    """Execute orders until standard input ends."""
    from vllm.model_executor.model_loader import base_loader, default_loader

    from tests.vllm import engine_process
    from vllm_rfork import loader
    from vllm_rfork.fork.session import ForkSession
    from vllm_rfork.load.context import LoadContext
    from vllm_rfork.seeding.manager import manager

    setting: dict[str, Any] = json.loads(sys.argv[1])
    rfork = setting["load_format"] == "rfork"
    timed = loader._Build if rfork else default_loader.DefaultModelLoader
    load_weights = timed.load_weights
    took: dict[str, Any] = {}

    def timing(self: Any, *args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        load_weights(self, *args, **kwargs)
        took["seconds"] = time.perf_counter() - started

    timed.load_weights = timing  # type: ignore[method-assign]
    open_session = LoadContext.open_session

    def remembering(context: LoadContext) -> ForkSession:
        session = took["session"] = open_session(context)
        return session

    setattr(LoadContext, "open_session", remembering)  # noqa: B010 - a method
    if not setting["post_process"]:
        base_loader.process_weights_after_loading = lambda *args, **kwargs: None
    for line in sys.stdin:
        order = json.loads(line)
        if order["order"] == "load":
            took.clear()
            config = engine_process.vllm_config(
                Path(setting["model"]), load_format=setting["load_format"], extra=setting["extra"]
            )
            model = engine_process.load(config)
            nbytes = sum(parameter.nbytes for parameter in model.parameters())
            session = took["session"] if rfork else None
            answer = {
                "seconds": took["seconds"],
                "nbytes": nbytes,
                "stages": dict(session.times.seconds) if session else {},
                "seed": str(session.seed) if session and session.seed else "",
                "peak_nbytes": peak_rss_nbytes(),
            }
            if order["keep"]:
                answer["announced"] = [str(seed.address) for seed in manager().seeds(120)]
                answer["peak_nbytes"] = peak_rss_nbytes()
                took["model"] = model
            else:
                took.clear()
                del session
            del model, config
            gc.collect()
            print("BENCH " + json.dumps(answer), flush=True)
    manager().withdraw("the benchmark is over", last=True)


if __name__ == "__main__":
    main()
