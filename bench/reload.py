"""Seconds of ``reload_weights`` after a sleep of level 2: from storage, and from a seed; and equal tokens.

``python -m bench.reload --model FOLDER`` on CUDA. This process serves with sleep mode; the seed is a process of its
own, on another GPU if there is one. Every reload must give the tokens of the first answers. Prints one JSON line. Not
part of ``make bench``, because it needs an accelerator.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

#: Reloads of each kind.
ROUNDS = 3


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", default="auto", help="rfork_engine of both sides")
    parser.add_argument("--seed-device", default="1", help="CUDA_VISIBLE_DEVICES of the seed")
    parser.add_argument("--llm", default="{}", help="more of vLLM's engine arguments, as JSON")
    parser.add_argument("--planner", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.planner:
        serve(arguments)
    else:
        print(json.dumps(measure(arguments)))


def started(arguments: argparse.Namespace, planner_url: str, **more: Any) -> Any:
    """An engine that loads by RFork."""
    from vllm import LLM

    from vllm_rfork.plugin import register

    register()  # for checkouts that are not installed; else vLLM has done it
    extra = {
        "model_url": "reload",
        "model_deploy_strategy_name": "bench",
        "rfork_scheduler_url": planner_url,
        "rfork_seed_advertise_host": "127.0.0.1",
        "rfork_engine": arguments.engine,
    }
    options = {"skip_tokenizer_init": True, "max_model_len": 2048, "gpu_memory_utilization": 0.3, **more}
    options.update(json.loads(arguments.llm))
    return LLM(model=arguments.model, load_format="rfork", model_loader_extra_config=extra, **options)


def serve(arguments: argparse.Namespace) -> None:
    """Be the seed until standard input ends."""
    from vllm_rfork.seeding.manager import manager

    started(arguments, arguments.planner)
    manager().seeds(120)
    print("ready", flush=True)
    sys.stdin.read()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sleep and reload without a seed, then with one."""
    from zoo.planner import Planner

    planner, log = Planner(), _Log()
    logging.getLogger("vllm_rfork").addHandler(log)
    llm = started(arguments, planner.url, enable_sleep_mode=True)
    expected = answers(llm)
    seconds = {"storage": [reload(llm, expected) for _ in range(ROUNDS)]}
    command = [sys.executable, "-m", "bench.reload", *sys.argv[1:], "--planner", planner.url]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": arguments.seed_device}
    pipe = subprocess.PIPE
    seed = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    try:
        if seed.stdout is None or not any(line == "ready\n" for line in seed.stdout):
            raise RuntimeError("the seed has ended; its error is above")
        seconds["seed"] = [reload(llm, expected) for _ in range(ROUNDS)]
    finally:
        seed.kill()
        planner.stop()
    forked = [line for line in log.lines if " into the running model in " in line]
    if len(forked) != ROUNDS:
        raise RuntimeError(f"{len(forked)} of {ROUNDS} reloads were forks: {log.lines}")
    medians = {name: round(statistics.median(each), 3) for name, each in seconds.items()}
    return {"median_s": medians, "s": seconds, "tokens": "equal", "forked": forked[-1]}


def answers(llm: Any) -> list[list[int]]:
    """The tokens of some prompts."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    prompts = [{"prompt_token_ids": list(range(5 + number, 45 + 3 * number))} for number in range(4)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    return [list(each.outputs[0].token_ids) for each in llm.generate(prompts, params, use_tqdm=False)]


def reload(llm: Any, expected: list[list[int]]) -> float:
    """Seconds of ``reload_weights`` after a sleep that keeps no weights.

    Raises:
        RuntimeError: the answers are others afterwards.
    """
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    began = time.perf_counter()
    llm.collective_rpc("reload_weights")
    seconds = time.perf_counter() - began
    llm.wake_up(tags=["kv_cache"])
    if answers(llm) != expected:
        raise RuntimeError("the answers are not those before the sleep")
    return seconds


class _Log(logging.Handler):
    """The lines that the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    main()
