"""The worker process of ``python -m zoo.events``: one real vLLM engine that executes one command after another.

It loads as it is ordered, reports, and then obeys: asks, reloads, updates, sleeps, alters a byte of its own. On the way
it can be made to stop at a place of the fork until it is told to go on, so that something may happen to its seed right
there. Must not judge: it says what it saw.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing.util
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from zoo.observe import Load, watching
from zoo.scenario_updates import register_updates
from zoo.workers import Order, _ask, _innermost, _Lines, recorded

#: Places of a fork where a worker can be stopped: the function of ``vllm_rfork.fork.transfer``, and which call of it.
#: The first request is the manifest's, the second asks whether its epoch still holds; all on the loading thread.
BEFORE_EPOCH, BEFORE_READ = ("_wait", 2), ("read_batch", 1)

EXPANDABLE = "expandable_segments:True"


@dataclasses.dataclass(frozen=True)
class Part:
    """Instructions of a process, in addition to its ``order``.

    Attributes:
        stops_at: one of the places above; the process then says ``stopped`` and waits for ``go``.
        expandable: turn the caching allocator to expandable segments when the load begins, where no variable tells.
    """

    order: Order
    stops_at: tuple[str, int] | None = None
    expandable: bool = False


@dataclasses.dataclass(frozen=True)
class SeedFacts:
    """A seed of the process: its address, key and epoch."""

    address: str
    seed_key: str
    fingerprint: str
    epoch: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes allocated by torch's caching allocator: now, and the maximum since the process started."""

    allocated: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Started:
    """The start of a process; ``error`` is empty if vLLM started. ``expandable`` and ``blocks`` count the allocator's
    blocks."""

    error: str = ""
    seconds: float = 0.0
    loads: list[Load] = dataclasses.field(default_factory=list)
    answers: list[Any] = dataclasses.field(default_factory=list)
    seeds: list[SeedFacts] = dataclasses.field(default_factory=list)
    lines: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    memory: Memory | None = None
    expandable: int = 0
    blocks: int = 0


@dataclasses.dataclass(frozen=True)
class Look:
    """A seed as seen from outside: the one that the planner ``granted`` (empty: none), and why the service at its
    address refuses the epoch (empty: it confirms it)."""

    granted: str
    refusal: str


def look(planner_url: str, seed: SeedFacts, timeout_s: float = 5.0) -> Look:
    """Request a seed of that key from the planner, release it, and ask the service to confirm the epoch.

    Raises:
        PlannerError: the planner does not answer.
    """
    from vllm_rfork.clients import PlannerClient, SeedClient
    from vllm_rfork.errors import NoSeedAvailable, SeedError
    from vllm_rfork.messages import SeedAddress

    host, port, rank = seed.address.rsplit(":", 2)

    async def looking() -> Look:
        planner, granted, refusal = PlannerClient(planner_url, request_timeout_s=timeout_s), "", ""
        try:
            lease = await planner.acquire(seed.seed_key, fingerprint=seed.fingerprint)
            granted = str(lease.seed)
            await planner.release(lease)
        except NoSeedAvailable:
            granted = ""
        try:
            client = SeedClient(request_timeout_s=timeout_s)
            await client.confirm_epoch(SeedAddress(host, int(port), int(rank)), seed.seed_key, seed.epoch)
        except SeedError as error:
            refusal = str(error)
        return Look(granted, refusal)

    return asyncio.run(looking())


def act(part: Part, connection: Connection) -> None:
    """Start as in ``part``, send :class:`Started`, and execute commands until ``end`` or the end of the connection.

    A command is a method's name of :class:`_Commands` with its arguments; its answer is ``("ok", value)`` or
    ``("error", text)``.
    """
    lines = recorded(part.order)
    commands = _Commands(lines)
    try:
        started = _start(part, connection, commands)
    except BaseException as error:  # noqa: BLE001 - whatever happens is what is reported
        traceback.print_exc()
        started = Started(error=_innermost(error))
    connection.send(dataclasses.replace(started, lines=list(lines.lines)))
    with contextlib.suppress(EOFError):
        while (received := connection.recv()) != "end":
            name, *arguments = received
            try:
                answer = ("ok", getattr(commands, name)(*arguments))
            except Exception as error:  # noqa: BLE001 - it is the answer
                traceback.print_exc()
                answer = ("error", _innermost(error))
            connection.send(answer)
            if name == "serve":
                commands.serve_for_ever()
    from vllm_rfork.seeding.manager import manager

    manager().withdraw("the events are over", last=True)
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]  # else the resource tracker complains
    sys.stdout.flush()
    os._exit(0)  # engines take their time to go, and have nothing left to do


def _start(part: Part, connection: Connection, commands: _Commands) -> Started:
    from vllm_rfork.plugin import register

    began = time.monotonic()
    register()  # what vLLM's plugin entry point does in every process
    register_updates()
    with watching() as watch, _stopping(part.stops_at, connection), _expanding(part.expandable):
        from vllm import LLM

        commands.llm = LLM(**part.order.engine_arguments)
        seeds = commands.seeds(60.0)
        memory = _memory()
        expandable, blocks = _blocks()
        loads = watch.finish()  # before prompts make more of it
    answers = commands.answers(part.order)
    return Started("", time.monotonic() - began, loads, answers, seeds, [], memory, expandable, blocks)


class _Commands:
    """The commands of :func:`act`; an exception is the answer."""

    def __init__(self, lines: _Lines) -> None:
        self.llm: Any = None
        self._lines = lines
        self._order: Order | None = None

    @property
    def _worker(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker

    def answers(self, order: Order | None = None) -> list[Any]:
        """Answer all prompts, with log-probabilities."""
        self._order = order or self._order
        return _ask(self.llm, self._order) if self._order else []

    def seeds(self, timeout_s: float) -> list[SeedFacts]:
        """Return the seeds of this process once none is starting."""
        from vllm_rfork.seeding.manager import manager

        return [
            SeedFacts(str(seed.address), seed.manifest.seed_key, seed.manifest.fingerprint, seed.manifest.epoch)
            for seed in manager().seeds(timeout_s)
            if seed.address
        ]

    def lines(self) -> list[tuple[str, str]]:
        """Return the plugin's log so far."""
        return list(self._lines.lines)

    def call(self, method: str, *arguments: Any) -> str:
        """Call the worker's method through the engine; return ``done``, or the exception."""
        try:
            self.llm.collective_rpc(method, args=arguments)
        except Exception as error:  # noqa: BLE001 - whether the method works here is the caller's question
            traceback.print_exc()
            return _innermost(error)
        return "done"

    def reload(self, folder: str, planner_url: str, seed: SeedFacts) -> Look:
        """Reload the weights from ``folder``; return the outside view of ``seed`` when the worker begins."""
        looks: list[Look] = []
        runner = self._worker.model_runner
        reload = runner.reload_weights

        def looking(*args: Any, **kwargs: Any) -> Any:
            looks.append(look(planner_url, seed))
            return reload(*args, **kwargs)

        runner.reload_weights = looking
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        finally:
            del runner.reload_weights
        return looks[0]

    def update(self, folder: str, planner_url: str, seed: SeedFacts) -> list[Look]:
        """Update the weights to those of ``folder`` by vLLM's weight transfer; return the outside view of ``seed``
        after the beginning and before the end."""
        self.llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {}})
        self.llm.collective_rpc("start_weight_update")
        looks = [look(planner_url, seed)]
        self.llm.collective_rpc("update_weights", kwargs={"update_info": {"folder": folder}})
        looks.append(look(planner_url, seed))
        self.llm.collective_rpc("finish_weight_update")
        return looks

    def reset_caches(self) -> list[str]:
        """Reset the caches of prompts and media; return the names of those that were reset."""
        done = []
        for name in ("reset_prefix_cache", "reset_mm_cache"):
            getattr(self.llm, name)()
            done.append(name)
        return [*done, f"reset_encoder_cache {self.call('reset_encoder_cache')}"]

    def alter(self) -> str:
        """Flip one bit of the largest tensor that the seed publishes; return its name. A second call flips it back."""
        from vllm_rfork.seeding.manager import manager

        (seed,) = manager().seeds(1.0)
        spans = seed.keep.spans
        number = max(range(len(spans)), key=lambda number: int(spans[number].data.numel()))
        data = spans[number].data
        data[data.numel() // 2] ^= 1
        data[data.numel() // 2].item()  # the device has done it when this is known
        return next(str(entry.name) for entry in seed.keep.entries if entry.span == number)

    def serve(self) -> str:
        """Answer this, and then prompts forever: see :meth:`serve_for_ever`."""
        return "serving"

    def serve_for_ever(self) -> None:
        """Answer prompts until the process is killed."""
        while True:
            self.answers()


def _memory() -> Memory | None:
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    return Memory(int(torch.cuda.memory_allocated()), int(torch.cuda.max_memory_allocated()))


def _blocks() -> tuple[int, int]:
    """Count the caching allocator's blocks: the expandable ones, and all."""
    import torch

    if not torch.cuda.is_available():
        return 0, 0
    try:
        segments = torch.cuda.memory_snapshot()
    except RuntimeError:  # a pluggable allocator does not tell
        return 0, 0
    return sum(bool(segment.get("is_expandable")) for segment in segments), len(segments)


@contextlib.contextmanager
def _stopping(place: tuple[str, int] | None, connection: Connection) -> Iterator[None]:
    """Send ``stopped`` before that call of that function, and wait for a message."""
    if place is None:
        yield
        return
    from vllm_rfork.fork import transfer

    name, number = place
    function: Callable[..., Any] = getattr(transfer, name)
    calls = [0]

    def stopping(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            connection.send("stopped")
            connection.recv()
        return function(*args, **kwargs)

    setattr(transfer, name, stopping)
    try:
        yield
    finally:
        setattr(transfer, name, function)


@contextlib.contextmanager
def _expanding(wanted: bool) -> Iterator[None]:
    """Allocate models in expandable segments, by a call that no environment variable shows.

    vLLM sets the allocator itself around a load, all of its options at once, so it is done inside.
    """
    if not wanted:
        yield
        return
    import torch

    from vllm_rfork.loader import RForkModelLoader

    load_model = RForkModelLoader.load_model
    configure: Any = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if configure is None:
        configure = torch.cuda.memory._set_allocator_settings

    def loading(self: Any, *args: Any, **kwargs: Any) -> Any:
        configure(EXPANDABLE)
        return load_model(self, *args, **kwargs)

    RForkModelLoader.load_model = loading  # type: ignore[method-assign]
    try:
        yield
    finally:
        RForkModelLoader.load_model = load_model  # type: ignore[method-assign]
