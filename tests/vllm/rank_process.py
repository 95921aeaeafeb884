"""One of two ranks that load a model together with real vLLM, over gloo, while some rank of the two cannot fork.

The model's constructor makes a process group and its post-processing has a collective, as communicators for experts
do: a rank that builds or post-processes alone waits there, until :data:`COLLECTIVE_TIMEOUT_S` makes that an error.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: What a collective waits for a rank that does not come.
COLLECTIVE_TIMEOUT_S = 30.0

#: Where rank 1 says no, and by what; rank 0 could fork, and has written where there was time for it.
FAULTS = ("no seed", "before a write", "after a write", "no dummies", "dies over dummies", "over dummies")

#: Faults that can only be in the runtime layout.
OF_RUNTIME = frozenset(FAULTS[3:])


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one load was like: how often the model was built, whether it is the default loader's, and what was said."""

    built: int
    equal: bool
    warnings: list[str]


def play(rank: int, port: int, model: str, log: str, connection: Connection) -> None:
    """Load ``model`` once by default and once for every fault; send outcomes by fault, or a text of what went wrong."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "VLLM_DIST_IDENT": f"ranks-{port}"}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    try:
        connection.send(_loads(rank, port, Path(model)))
    except BaseException as error:  # noqa: BLE001 - the test says it
        traceback.print_exc()
        connection.send(f"rank {rank}: {type(error).__name__}: {error}")
    # Rank 0 holds the store: both stay until both have reported.
    connection.recv()
    os._exit(0)


def _loads(rank: int, port: int, model: Path) -> dict[str, Outcome]:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    from tests.vllm.conftest import LogRecords, extra_for
    from tests.vllm.engine_process import load_digested, vllm_config

    extra = extra_for("http://127.0.0.1:9", rfork_become_seed=False, rfork_fork_timeout_sec=60.0)
    log = LogRecords()
    logging.getLogger("vllm_rfork").addHandler(log)
    both: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}
    with set_current_vllm_config(vllm_config(model, **both)):
        parallel_state.init_distributed_environment(2, rank, f"tcp://127.0.0.1:{port}", local_rank=rank, backend="gloo")
        parallel_state.ensure_model_parallel_initialized(2, 1)
    built = _needs_both_ranks()
    default = load_digested(vllm_config(model, **both))
    outcomes = {}
    for fault in FAULTS:
        layout = "runtime" if fault in OF_RUNTIME else "checkpoint"
        built.clear()
        log.records.clear()
        restore = _fail(rank, fault)
        try:
            config = vllm_config(model, load_format="rfork", extra={**extra, "rfork_layout": layout}, **both)
            loaded = load_digested(config)
        finally:
            restore()
        outcomes[fault] = Outcome(len(built), loaded.after == default.after, log.warnings)
    return outcomes


def _needs_both_ranks() -> list[int]:
    """Make building and post-processing the model collective; returns a list that grows by each building."""
    import torch
    import torch.distributed as dist
    from vllm.model_executor.layers import utils
    from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

    from vllm_rfork.load import context, from_fork

    context.NO_RUNTIME = frozenset()  # as on an accelerator; see test_runtime
    setattr(from_fork, "built_differences", lambda *args: ())  # noqa: B010 - no seed here says how its model was built
    utils.check_cpu_sgl_kernel = lambda *args: False
    utils.ops._supports_onednn = False
    built: list[int] = []
    groups: list[Any] = []
    build = Qwen2ForCausalLM.__init__

    @functools.wraps(build)  # vLLM looks at its arguments
    def together(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append(1)
        timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        groups.append(dist.new_group([0, 1], backend="gloo", timeout=timeout))
        dist.all_reduce(torch.ones(1), group=groups[-1])
        build(self, *args, **kwargs)

    def process(self: Any) -> None:
        dist.all_reduce(torch.ones(1), group=groups[-1])

    Qwen2ForCausalLM.__init__ = together
    Qwen2ForCausalLM.process_weights_after_loading = process
    return built


def _fail(rank: int, fault: str) -> Callable[[], None]:
    """Give this rank a seed that says what the rank expects, and rank 1 the fault; returns what undoes it."""
    from vllm_rfork.errors import ForkError, ManifestMismatch, NoSeedAvailable
    from vllm_rfork.fork.session import ForkSession
    from vllm_rfork.manifest.schema import Manifest
    from vllm_rfork.vllm_compat import dummy_weights

    here = rank == 1
    before = {name: getattr(ForkSession, name) for name in ("reserve", "peek", "run")}
    fill = dummy_weights.fill_with_dummies

    def reserve(self: Any, fingerprint: str) -> None:
        if here and fault == "no seed":
            raise NoSeedAvailable("no seed for this rank")

    def peek(self: Any, fingerprint: str) -> Manifest:
        return Manifest(
            seed_key=self.seed_key,
            fingerprint=fingerprint,
            epoch="",
            layout="runtime",
            engine="memory",
            endpoint="",
            regions=(),
            spans=(),
            tensors=(),
        )

    def run(self: Any, target: Any) -> Any:
        if here and fault == "before a write":
            raise ManifestMismatch("the seed's tensors are others")
        self.has_written = True  # as the session records it before the first read
        for span in target.memory.spans:
            if span.address not in target.untouched:
                span.data.zero_()
        if here:
            raise ForkError("the bytes are not the seed's")
        return target.local

    def filled(*args: Any) -> None:
        if here and fault == "no dummies":
            raise ForkError("this model takes no dummies")
        if here and fault == "dies over dummies":
            raise RuntimeError("out of memory")
        fill(*args)

    ForkSession.reserve, ForkSession.peek, ForkSession.run = reserve, peek, run  # type: ignore[method-assign]
    dummy_weights.fill_with_dummies = filled

    def restore() -> None:
        for name, method in before.items():
            setattr(ForkSession, name, method)
        dummy_weights.fill_with_dummies = fill

    return restore
