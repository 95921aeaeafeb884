"""The worker process of the zoo: it loads one model, digests it, answers prompts, and stays if it is a seed.

Every worker runs vLLM's own worker in this process, through vLLM's own executor, on whatever platform vLLM finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing.process
import multiprocessing.util
import os
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from zoo.observe import Load, Watch, watching

#: Prompts as token numbers below 256; unequal in length and content, so that their answers differ.
PROMPTS = ([5, 9, 77, 130], [200, 3, 3, 8, 41], [17], list(range(40, 60)))

#: Use of a model: ``generate`` tokens, ``embed`` prompts, or only ``load`` it.
GENERATE, EMBED, LOAD = "generate", "embed", "load"

#: The nodes of an instance whose workers vLLM's own executor starts: see ``Order``.
LEADER, FOLLOWER = "leader", "follower"

#: vLLM's options for every model; small caches, so that several models fit beside each other.
ENGINE_ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class Order:
    """Instructions of a process.

    Attributes:
        engine_arguments: vLLM's, ``model`` and ``load_format`` among them.
        asks: one of GENERATE, EMBED, LOAD.
        adapter: folder of a LoRA adapter that is asked as well; empty for none.
        media, media_token: see ``Case``.
        log: file that takes everything this process prints.
        environment: set before anything is loaded.
        drafts: note what a draft proposes, too: without it, a draft's weights have no part in any answer.
        port: where the ranks of one instance meet; 0 for a single rank.
        replicas, replica: data parallel engines of a dense model, and which of them this process is.
        workers: who has the workers: empty for this process, else ``leader`` or ``follower``: vLLM's own executor
            starts them as processes, and the first node's collects what they report.
    """

    engine_arguments: dict[str, Any]
    asks: str
    log: str
    adapter: str = ""
    media: str = ""
    media_token: int = 0
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    drafts: bool = False
    port: int = 0
    replicas: int = 1
    replica: int = 0
    workers: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a process: its loads, its answers, its seeds' addresses, and the plugin's log lines.

    ``error`` is empty on success; ``storage_s`` is the duration of reading storage, in seconds; ``workers`` are the
    reports of an instance's workers, by rank, if those are processes of their own.
    """

    loads: list[Load] = dataclasses.field(default_factory=list)
    answers: list[Any] = dataclasses.field(default_factory=list)
    seeds: list[str] = dataclasses.field(default_factory=list)
    lines: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    storage_s: float = 0.0
    error: str = ""
    workers: list[Report] = dataclasses.field(default_factory=list)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


#: What watches this process, for :func:`_of_a_worker`.
_watching: list[tuple[Watch, _Lines]] = []


def recorded(order: Order) -> _Lines:
    """Redirect this process's output into its log, set its environment, and record the plugin's log lines."""
    with open(order.log, "ab", buffering=0) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.environ.update(order.environment)
    lines = _Lines()
    logging.getLogger("vllm_rfork").addHandler(lines)
    return lines


def play(order: Order, connection: Connection) -> None:
    """Follow ``order``, send a :class:`Report`, and stay until a message or the end of the connection."""
    lines = recorded(order)
    alive: list[Any] = []  # the engine
    with watching() as watch:
        _watching.append((watch, lines))
        try:
            report = _follow(order, watch, alive)
        except BaseException as error:  # noqa: BLE001 - whatever happens is what the zoo reports
            traceback.print_exc()
            report = Report(error=_innermost(error))
    connection.send(dataclasses.replace(report, lines=lines.lines))
    with contextlib.suppress(EOFError):
        connection.recv()
    from vllm_rfork.seeding.manager import manager

    manager().withdraw("the zoo is done with it", last=True)
    alive.clear()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # else the resource tracker complains
    sys.stdout.flush()
    os._exit(0)  # engines take their time to go, and have nothing left to do


def _follow(order: Order, watch: Watch, alive: list[Any]) -> Report:
    from vllm_rfork.plugin import register
    from vllm_rfork.seeding.manager import manager

    register()  # what vLLM's plugin entry point does in every process
    if order.port:
        _meet_at(order.port)
    if order.replicas > 1:
        _be_replica(order.replica, order.replicas)
    if order.workers:
        _fork_workers(order)
    if order.workers == FOLLOWER:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        # As ``vllm serve --headless`` does.
        config = EngineArgs(**order.engine_arguments).create_engine_config(headless=True)
        alive.append(MultiprocExecutor(config, monitor_workers=False))
        return Report()
    if order.asks == LOAD:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.executor.abstract import Executor

        config = EngineArgs(**order.engine_arguments).create_engine_config()
        alive.append(Executor.get_class(config)(config))
    else:
        from vllm import LLM

        alive.append(LLM(**order.engine_arguments))
    if order.workers:
        workers: list[Report] = alive[0].collective_rpc(_of_a_worker)
        if order.asks != LOAD:
            alive[0].collective_rpc(_profile)
        workers[0] = dataclasses.replace(workers[0], answers=[] if order.asks == LOAD else _ask(alive[0], order))
        return Report(workers=workers)
    loads = watch.finish()  # before prompts make more of it: lazy values, adapters
    with _noting_drafts() as drafted:
        answers = [] if order.asks == LOAD else _ask(alive[0], order)
    if order.drafts and order.asks != LOAD:
        answers.append(("drafts", drafted))
    seeds = [str(seed.address) for seed in manager().seeds(120) if seed.address]
    return Report(loads=loads, answers=answers, seeds=seeds, storage_s=watch.storage_s)


def _ask(llm: Any, order: Order) -> list[Any]:
    """Answer all prompts, one at a time: batches alone can change logprobs."""
    if order.asks == EMBED:
        return [
            list(llm.embed({"prompt_token_ids": prompt}, use_tqdm=False)[0].outputs.embedding) for prompt in PROMPTS
        ]
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, detokenize=False)
    adapters: list[Any] = [None]
    if order.adapter:
        from vllm.lora.request import LoRARequest

        adapters.append(LoRARequest("zoo", 1, order.adapter))
    prompts: list[dict[str, Any]] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    if order.media:
        place = [5, order.media_token, 9, 130]
        prompts.append({"prompt_token_ids": place, "multi_modal_data": {order.media: _medium(order.media)}})
    found = []
    for adapter in adapters:
        for prompt in prompts:
            outputs = llm.generate(prompt, sampling, use_tqdm=False, lora_request=adapter)
            answer = outputs[0].outputs[0]
            logprobs = [{token: p.logprob for token, p in step.items()} for step in answer.logprobs or []]
            found.append((list(answer.token_ids), logprobs))
    return found


@contextlib.contextmanager
def _noting_drafts() -> Iterator[list[Any]]:
    """Record the tokens that a draft model proposes in each step, as vLLM's executor passes them to the scheduler."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    noted: list[Any] = []
    take = UniProcExecutor.take_draft_token_ids

    def noting(self: Any) -> Any:
        taken = take(self)
        if taken is not None:
            noted.append([list(tokens) for tokens in taken.draft_token_ids])
        return taken

    UniProcExecutor.take_draft_token_ids = noting
    try:
        yield noted
    finally:
        UniProcExecutor.take_draft_token_ids = take


def _medium(kind: str) -> Any:
    """Return an image of 56 by 56 pixels, or 0.1 s of sound with its rate in Hz; always the same."""
    import numpy

    if kind == "audio":
        return numpy.sin(numpy.arange(1600) / 7).astype(numpy.float32), 16000
    from PIL import Image

    rows = numpy.arange(56 * 56 * 3) % 251
    return Image.fromarray(rows.reshape(56, 56, 3).astype(numpy.uint8))


def _meet_at(port: int) -> None:
    """Set the rendezvous ``port`` of the ranks of an instance that vLLM did not start itself.

    vLLM's external launcher would take the address from the environment, and its CPU worker names its shared memory
    after the address: several instances on one host would share it.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    rank = int(os.environ["RANK"])

    def arguments(self: Any) -> tuple[str, int, int]:
        del self
        return f"tcp://127.0.0.1:{port}", rank, rank

    ExecutorWithExternalLauncher._distributed_args = arguments


def _of_a_worker(worker: Any) -> Report:
    """Return the report of this worker of vLLM's own executor, which was forked from an observed process."""
    del worker
    ((watch, lines),) = _watching
    return Report(loads=watch.finish(), storage_s=watch.storage_s, lines=lines.lines)


def _profile(worker: Any) -> None:
    """Make a later pipeline stage's buffers: vLLM does so in this run, but not on CPU without compilation."""
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and parallel_state.get_pp_group().world_size > 1:
        worker.model_runner.profile_run()


def _fork_workers(order: Order) -> None:
    """Let vLLM's executor fork its workers, with this process's observers; on CPU it would spawn them.

    A node of several on this host gets the device of its number.
    """
    from vllm.platforms import current_platform
    from vllm.v1.executor import multiproc_executor

    multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have children
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    if order.engine_arguments.get("nnodes", 1) > 1 and not current_platform.is_cpu():
        variable = current_platform.device_control_env_var
        number = int(order.engine_arguments["node_rank"])
        visible = os.environ.get(variable, "")
        os.environ[variable] = visible.split(",")[number] if visible else str(number)


def _be_replica(index: int, count: int) -> None:
    """Configure engines as vLLM's engine core does for data parallel ranks of a dense model: each is independent.

    ``LLM`` takes no data_parallel_size unless an external launcher puts all ranks into one group.
    """
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def created(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = create(self, *args, **kwargs)
        parallel = config.parallel_config
        parallel.data_parallel_size = count
        parallel.data_parallel_rank = parallel.data_parallel_index = index
        parallel.data_parallel_rank_local = index  # which chooses its device
        if hasattr(parallel, "reconfigure_for_independent_dp_rank"):
            parallel.reconfigure_for_independent_dp_rank()
        else:  # before it had a name of its own; 0.24 is such a release
            parallel.data_parallel_size = parallel.data_parallel_size_local = 1
            parallel.data_parallel_rank = 0
        return config

    EngineArgs.create_engine_config = created


def _innermost(error: BaseException) -> str:
    """Return the first cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"
