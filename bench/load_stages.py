"""One start of vLLM in this process, with the seconds of each stage of its load. A child of :mod:`bench.load_profile`.

The stages are functions of this package and of vLLM, which are wrapped by name from outside: so other checkouts and
other releases can be measured, and a name that one of them lacks costs its stage only. A stage's seconds exclude those
of the stages inside it, so that all of them add up to the load.
"""

from __future__ import annotations

import contextlib
import cProfile
import functools
import gc
import importlib
import json
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

#: Stage → the functions that it consists of, as ``module:name``. The module is the one that looks the name up.
STAGES: dict[str, tuple[str, ...]] = {
    "describe": ("vllm_rfork.loader:describe",),
    "registries": ("vllm_rfork.vllm_compat.registries:Registries.capture",),
    "session": ("vllm_rfork.load.context:LoadContext.open_session",),
    "build": ("vllm.model_executor.model_loader.base_loader:initialize_model",),
    "look at what was built": ("vllm_rfork.load.capture:built_model",),
    "reserve": ("vllm_rfork.load.from_fork:FromFork.reserve",),
    "wait for an engine": ("vllm_rfork.fork.engine_set:EngineSet.await_one",),
    "dummies": ("vllm_rfork.load.from_fork:FromFork.fill_with_dummies",),
    "storage": ("vllm.model_executor.model_loader.default_loader:DefaultModelLoader.load_weights",),
    "post-process": ("vllm.model_executor.model_loader.base_loader:process_weights_after_loading",),
    "inventory": ("vllm_rfork.load.capture:contents",),
    "fork": ("vllm_rfork.load.from_fork:FromFork.read",),
    "addresses": ("vllm_rfork.load.from_storage:memory_of", "vllm_rfork.load.from_storage:check_no_addresses"),
    "capture": ("vllm_rfork.load.from_fork:FromFork._capture",),
    "outcome": ("vllm_rfork.load.machine:LoadMachine.outcome",),
    "publish": ("vllm_rfork.seeding.manager:SeedManager.publish", "vllm_rfork.loader:withdraw_before_changes"),
}
#: Stages of ``StageTimes`` that have the same name here.
SAME = (
    "planner",
    "first metadata",
    "metadata",
    "pairing",
    "registration",
    "connect",
    "epoch",
    "read",
    "verify",
    "state",
    "digest",
)
#: The whole load; the CPU's worker inherits this method.
WORKER_LOAD = "vllm.v1.worker.gpu_worker:Worker.load_model"
#: Names of the whole load, and of what precedes it in the worker.
LOAD, INIT_DEVICE = "load_model", "init_device"
WALK, OTHER = "walk", "other"


class Recorder:
    """Seconds and counts by stage, of the thread that loads."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.cpu_seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self.total_s = 0.0
        self._open: list[list[float]] = []
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def stage(self, name: str, *, always: bool = False) -> Iterator[None]:
        """Add the duration of the block to ``name``, without that of the stages inside it.

        Args:
            always: also outside a load; other blocks count only within one.
        """
        if threading.get_ident() != self._thread or not (self._open or always):
            yield
            return
        inside = [0.0, 0.0]
        self._open.append(inside)
        began, began_cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            took, took_cpu = time.perf_counter() - began, time.thread_time() - began_cpu
            self._open.pop()
            self.seconds[name] += took - inside[0]
            self.cpu_seconds[name] += took_cpu - inside[1]
            self.counts[name] += 1
            if self._open:
                self._open[-1][0] += took
                self._open[-1][1] += took_cpu
            elif name == OTHER:
                self.total_s += took


def wrap(place: str, around: Callable[[Any], Any]) -> None:
    """Replace the function at ``place`` (``module:name``) by ``around(function)``; nothing if there is none."""
    module, _, dotted = place.partition(":")
    *owners, name = dotted.split(".")
    try:
        owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
        found = vars(owner)[name]
    except (ImportError, AttributeError, KeyError):
        print(f"there is no {place} to measure", file=sys.stderr)
        return
    kind = type(found) if isinstance(found, (classmethod, staticmethod)) else None
    wrapped = around(found.__func__ if kind else found)
    setattr(owner, name, kind(wrapped) if kind else wrapped)


def timed(recorder: Recorder, stage: str, *, always: bool = False) -> Callable[[Any], Any]:
    """A decorator that adds the duration of each call to ``stage``."""

    def around(function: Any) -> Any:
        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with recorder.stage(stage, always=always):
                return function(*args, **kwargs)

        return measured

    return around


def instrument(recorder: Recorder) -> None:
    """Wrap every stage."""
    from vllm.platforms import current_platform

    for stage, places in STAGES.items():
        for place in places:
            wrap(place, timed(recorder, stage))
    _instrument_walks(recorder)
    _instrument_stage_times(recorder)
    worker = "cpu_worker:CPUWorker" if current_platform.is_cpu() else "gpu_worker:Worker"
    wrap(f"vllm.v1.worker.{worker}.init_device", timed(recorder, INIT_DEVICE, always=True))
    wrap(WORKER_LOAD, timed(recorder, OTHER, always=True))


def _instrument_walks(recorder: Recorder) -> None:
    """Time each walk to its end; its users do their own work between two leaves."""
    from vllm_rfork.model import traversal

    original = traversal.walk

    def walk(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with recorder.stage(WALK):
            leaves = list(original(*args, **kwargs))
        recorder.counts["leaves"] += len(leaves)
        return iter(leaves)

    for module in [module for name, module in sys.modules.items() if name.startswith("vllm_rfork.")]:
        if vars(module).get("walk") is original:
            setattr(module, "walk", walk)  # noqa: B010 - a name of another module


def _instrument_stage_times(recorder: Recorder) -> None:
    """Take over the stages that the package measures itself."""
    from vllm_rfork.fork.stage_times import StageTimes

    original = StageTimes.stage

    @contextlib.contextmanager
    def stage(self: StageTimes, name: str) -> Iterator[None]:
        with original(self, name), recorder.stage(name) if name in SAME else contextlib.nullcontext():
            yield

    setattr(StageTimes, "stage", stage)  # noqa: B010 - a method


class Collections:
    """Garbage collections within a load: their number and seconds, by generation."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self._began = 0.0

    def __call__(self, phase: str, about: dict[str, int]) -> None:
        """Take note of the beginning or the end of one, as :data:`gc.callbacks` reports them."""
        if phase == "start":
            self._began = time.perf_counter()
            return
        generation = f"generation {about['generation']}"
        self.seconds[generation] += time.perf_counter() - self._began
        self.counts[generation] += 1


def main() -> None:
    """Import, wait for the order to begin, start vLLM, answer one prompt, and report; end with standard input."""
    setting: dict[str, Any] = json.loads(sys.argv[1])
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.v1.worker import gpu_worker  # noqa: F401 - its import does not belong to the load

    from vllm_rfork.plugin import register
    from vllm_rfork.seeding.manager import manager

    register()  # for checkouts that are not installed; else vLLM has done it
    if setting["runtime"]:
        _allow_runtime()
    recorder, collections = Recorder(), Collections()
    instrument(recorder)
    profile = cProfile.Profile() if setting.get("calls") else None
    if profile is not None:
        wrap(
            "vllm.v1.worker.gpu_worker:Worker.load_model",
            lambda load: functools.partialmethod(_profiled, profile, load),
        )
    _say({"ready": True})
    sys.stdin.readline()
    gc.callbacks.append(collections)
    began = time.perf_counter()
    llm = LLM(**setting["llm"])
    engine_s = time.perf_counter() - began
    gc.callbacks.remove(collections)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    answer = llm.generate([{"prompt_token_ids": list(range(5, 40))}], sampling, use_tqdm=False)
    if profile is not None:
        profile.dump_stats(setting["calls"])
    seeds = manager().seeds(120) if setting["is_seed"] else []
    _say(
        {
            "load_s": recorder.total_s,
            "engine_s": engine_s,
            "seconds": dict(recorder.seconds),
            "cpu_seconds": dict(recorder.cpu_seconds),
            "counts": dict(recorder.counts),
            "collections": {"seconds": dict(collections.seconds), "counts": dict(collections.counts)},
            "tokens": list(answer[0].outputs[0].token_ids),
            "seeds": [str(seed.address) for seed in seeds],
        }
    )
    sys.stdin.read()
    manager().withdraw("the profile is over", last=True)


def _allow_runtime() -> None:
    """Take the runtime layout on a CPU, and keep vLLM from packing weights into native objects."""
    from vllm.model_executor.layers import utils

    from vllm_rfork.devices.cpu import CpuBackend
    from vllm_rfork.load import context

    context.NO_RUNTIME = frozenset()
    CpuBackend.has_copy_engine = True
    utils.check_cpu_sgl_kernel = lambda *args: False
    utils.ops._supports_onednn = False


def _profiled(worker: Any, profile: cProfile.Profile, load: Any, *args: Any, **kwargs: Any) -> Any:
    return profile.runcall(load, worker, *args, **kwargs)


def _say(what: dict[str, Any]) -> None:
    print("PROFILE " + json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
