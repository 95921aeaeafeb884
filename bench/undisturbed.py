"""Time per token of a serving instance, idle and while a peer reads its weights continuously.

``python -m bench.undisturbed --model FOLDER`` on any platform that vLLM serves on. The seed serves in this process;
the peer is a process of its own that reads all of the weights repeatedly through the same engine. That is more load
than any fleet causes: a fork reads them once. Idle and read turns alternate. Also prints the processor time of an idle
seed, and the cost of verification: reads without digests, with digests in parallel, and with digests afterwards, in
turns. Not part of ``make bench``, because it needs an accelerator.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

#: Token steps per turn, and turns of each kind.
STEPS, TURNS = 300, 4
#: Reads of each kind, to measure the cost of verification.
READS = 7
IDLE_S = 10.0


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", default="nixl")
    parser.add_argument("--reader-device", default="cuda:1", help="device of the peer's buffer")
    parser.add_argument("--llm", default="{}", help="more of vLLM's engine arguments, as JSON")
    parser.add_argument("--no-verification", action="store_true", help="leave out the cost of verification")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read_for_ever(Path(arguments.read), arguments.engine, arguments.reader_device)
        return
    print(json.dumps(measure(arguments)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Serve, be read, and compare."""
    from vllm import LLM, SamplingParams

    from vllm_rfork.manifest.codec import encode_manifest
    from vllm_rfork.plugin import register
    from vllm_rfork.seeding.manager import manager
    from zoo.planner import Planner, eventually

    register()  # for checkouts that are not installed; else vLLM has done it
    planner = Planner()
    extra = {
        "model_url": "undisturbed",
        "model_deploy_strategy_name": "bench",
        "rfork_scheduler_url": planner.url,
        "rfork_seed_advertise_host": "127.0.0.1",
        "rfork_engine": arguments.engine,
    }
    options = {"skip_tokenizer_init": True, "max_model_len": 2048, "max_num_seqs": 4, **json.loads(arguments.llm)}
    llm = LLM(model=arguments.model, load_format="rfork", model_loader_extra_config=extra, **options)
    (seed,) = manager().seeds(120)
    eventually(lambda: seed.address, "the seed is announced", 120)

    def turn() -> list[float]:
        """Seconds of each token step of one sequence, after the first few."""
        params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request(str(time.monotonic_ns()), {"prompt_token_ids": list(range(5, 37))}, params)
        steps = []
        while llm.llm_engine.has_unfinished_requests():
            began = time.perf_counter()
            llm.llm_engine.step()
            steps.append(time.perf_counter() - began)
        return steps[8:]

    for _ in range(2):
        turn()
    idle_share = share_of_a_core()

    file = Path(tempfile.mkdtemp()) / "manifest.json"
    file.write_bytes(encode_manifest(seed.manifest))
    command = [sys.executable, "-m", "bench.undisturbed", "--model", "-", "--engine", arguments.engine]
    reader = subprocess.Popen(
        [*command, "--reader-device", arguments.reader_device, "--read", str(file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def tell(word: str) -> str:
        """Send ``word``, if any, and return what the reader answers."""
        if reader.stdin is None or reader.stdout is None:
            raise RuntimeError("the reader was started without pipes")
        if word:
            reader.stdin.write(f"{word}\n")
            reader.stdin.flush()
        if not (answer := reader.stdout.readline()):
            raise RuntimeError("the reader has ended; its error is above")
        return answer

    tell("")
    turns: dict[str, list[list[float]]] = {"idle": [], "read": []}
    rates: list[float] = []
    for _ in range(TURNS):
        turns["idle"].append(turn())
        tell("go")
        turns["read"].append(turn())
        rates.append(float(tell("pause").split()[1]))
    verification = None if arguments.no_verification else json.loads(tell("verify"))
    reader.kill()
    shutil.rmtree(file.parent)
    planner.stop()
    nbytes = seed.manifest.nbytes
    manager().withdraw("the benchmark is over", last=True)
    return {
        "nbytes": nbytes,
        "read_gb_per_s": [round(rate, 1) for rate in rates],
        **summary(turns),
        "verification": verification,
        "idle_share_of_a_core": idle_share,
        "idle_share_of_a_core_without_seed": share_of_a_core(),
    }


def share_of_a_core() -> float:
    """Share of one core that this idle process uses, vLLM's threads included."""
    began, used = time.monotonic(), time.process_time()
    time.sleep(IDLE_S)
    return (time.process_time() - used) / (time.monotonic() - began)


def summary(turns: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians and 99th percentiles of the steps of all turns, in milliseconds, and their ratios."""
    result: dict[str, Any] = {}
    for name, each in turns.items():
        flat = sorted(step for steps in each for step in steps)
        result[name] = {
            "median_ms": statistics.median(flat) * 1e3,
            "p99_ms": flat[int(len(flat) * 0.99)] * 1e3,
            "medians_ms": [statistics.median(steps) * 1e3 for steps in each],
        }
    result["ratio_median"] = result["read"]["median_ms"] / result["idle"]["median_ms"]
    result["ratio_p99"] = result["read"]["p99_ms"] / result["idle"]["p99_ms"]
    return result


def read_for_ever(file: Path, engine_name: str, device: str) -> None:
    """Read all that the manifest in ``file`` lists, again and again, between ``go`` and ``pause`` on standard input."""
    import threading

    import torch

    from vllm_rfork.engines.base import EngineConfig
    from vllm_rfork.engines.registry import engine_class
    from vllm_rfork.manifest.codec import decode_manifest
    from vllm_rfork.manifest.schema import Region
    from vllm_rfork.manifest.segments import Segment, batches

    manifest = decode_manifest(file.read_bytes())
    buffer = torch.empty(manifest.nbytes + 512 * len(manifest.spans), dtype=torch.uint8, device=device)
    at, segments = buffer.data_ptr(), []
    for span in manifest.spans:
        segments.append(Segment(at, span.address, span.nbytes))
        at += -(-span.nbytes // 512) * 512
    engine = engine_class(engine_name)()
    engine.open(EngineConfig(device=device))
    engine.register([Region(buffer.data_ptr(), buffer.numel())])
    engine.connect(manifest.endpoint, 30.0)
    limits = engine.limits_for(manifest.endpoint)
    cut = list(batches(segments, max_nbytes=limits.max_batch_nbytes, max_items=limits.max_batch_items))
    for batch in cut:
        engine.read(manifest.endpoint, batch, 60.0)
    print("ready", flush=True)
    for line in sys.stdin:
        if line == "verify\n":
            print(json.dumps(verified_reads(manifest, segments, engine, buffer)), flush=True)
        if line != "go\n":
            continue
        paused = threading.Event()
        threading.Thread(target=lambda paused=paused: (sys.stdin.readline(), paused.set()), daemon=True).start()
        print("reading", flush=True)
        copied, began = 0, time.perf_counter()
        while not paused.is_set():
            for batch in cut:
                engine.read(manifest.endpoint, batch, 60.0)
            copied += manifest.nbytes
        print(f"rate {copied / 1e9 / (time.perf_counter() - began):.3f}", flush=True)


def verified_reads(manifest: Any, segments: list[Any], engine: Any, buffer: Any) -> dict[str, Any]:
    """Median seconds of a whole read, by when digests are computed; ``first`` is the first read of each kind."""
    from types import SimpleNamespace

    from vllm_rfork.devices.registry import device_backend
    from vllm_rfork.fork.transfer import read_batch
    from vllm_rfork.manifest.segments import batches
    from vllm_rfork.model import digest
    from vllm_rfork.model.tensors import LocalSpan
    from vllm_rfork.model.verification import StreamingVerifier

    start = buffer.data_ptr()
    spans = [
        LocalSpan(segment.local, segment.nbytes, buffer[segment.local - start :][: segment.nbytes])
        for segment in segments
    ]
    collection: Any = SimpleNamespace(spans=spans, entries=())
    expected = {number: span.digest for number, span in enumerate(manifest.spans)}
    side, limits = device_backend(buffer.device), engine.limits_for(manifest.endpoint)

    def read(how: str) -> float:
        side.synchronize()
        began = time.perf_counter()
        check = StreamingVerifier(collection, list(expected), side, 60.0)
        for batch in batches(segments, max_nbytes=limits.max_batch_nbytes, max_items=limits.max_batch_items):
            read_batch(engine, manifest.endpoint, batch, 60.0)
            if how == "beside":
                check.arrived(batch)
        if how == "beside":
            check.finish(expected)
        elif how == "after" and digest.digests(span.data for span in spans) != list(expected.values()):
            raise RuntimeError("the bytes read do not have the seed's digests")
        seconds = time.perf_counter() - began
        check.close()
        return seconds

    first = {"first without": read("without"), "first beside": read("beside")}
    kinds = ("without", "beside", "after")
    taken = {how: [] for how in kinds}  # type: dict[str, list[float]]
    for _ in range(READS):
        for how in kinds:
            taken[how].append(read(how))
    return {**first, **{how: {"median": statistics.median(each), "all": sorted(each)} for how, each in taken.items()}}


if __name__ == "__main__":
    main()
