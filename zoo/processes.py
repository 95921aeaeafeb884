"""The zoo's processes, each forked from a server that has already imported vLLM.

A process of its own per role keeps vLLM's process-wide caches out of the comparison; forking it from a server that
has done the imports makes it start within a second. Must not import torch or vLLM itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import platform
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from zoo.planner import ROOT
from zoo.workers import FOLLOWER, LEADER, Order, Report, play

#: For every role. Dynamo is off since vLLM compiles a helper of its sampler even where models are not compiled.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class RoleFailed(Exception):
    """A process of the zoo ended or hung without a report; the text names it and its log."""


@contextlib.contextmanager
def fork_server(threads: int) -> Iterator[None]:
    """Start the server with an environment that every worker inherits, with ``threads`` CPU threads each."""
    changes = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    path = os.environ.get("PYTHONPATH")
    changes["PYTHONPATH"] = str(ROOT) if not path else f"{ROOT}{os.pathsep}{path}"
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    # vLLM's own setting of the cache size on CPU counts whole GiB and goes before the option.
    space = os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["zoo.preload"])
        # Any process starts the server.
        process = context.Process(target=_nothing)
        process.start()
        process.join()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if space is not None:
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = space
    try:
        yield
    finally:
        # The next server may need another environment, and this one holds all that vLLM imports.
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def _nothing() -> None:
    pass


class Role:
    """One running process; it stays after its report until :meth:`end`."""

    def __init__(self, order: Order) -> None:
        self._order = order
        context = multiprocessing.get_context("forkserver")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=play, args=(order, other), daemon=True)
        self._process.start()
        other.close()

    def report(self, timeout_s: float) -> Report:
        """Return its report.

        Raises:
            RoleFailed: it ended without a report, or sent none within ``timeout_s`` seconds.
        """
        try:
            if self._connection.poll(timeout_s):
                report: Report = self._connection.recv()
                return report
        except EOFError as error:
            self._process.join(5)
            raise RoleFailed(f"exit code {self._process.exitcode}; see {self._order.log}") from error
        raise RoleFailed(f"no report within {timeout_s:g} s; see {self._order.log}")

    def end(self) -> None:
        """Let it withdraw and exit; kill it if it does not."""
        with contextlib.suppress(OSError):
            self._connection.send("end")
        self._process.join(15)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._connection.close()


class Instance:
    """The ranks of one instance of vLLM, each a :class:`Role`."""

    def __init__(self, orders: list[Order]) -> None:
        self.roles = [Role(order) for order in orders]

    def reports(self, timeout_s: float) -> list[Report]:
        """Return one report per rank.

        Raises:
            RoleFailed: see :meth:`Role.report`.
        """
        reports = [role.report(timeout_s) for role in self.roles]
        workers = [worker for report in reports for worker in report.workers]
        return workers + [report for report in reports if report.error] if workers else reports

    def end(self) -> None:
        """End every rank."""
        for role in self.roles:
            role.end()


@contextlib.contextmanager
def instance(order: Order, ranks: int, port: int) -> Iterator[Instance]:
    """Run an instance of ``ranks`` ranks that follow ``order`` and rendezvous at ``port``; end it after the block."""
    orders = [order]
    if order.replicas > 1:
        orders = [
            dataclasses.replace(order, replica=number, log=f"{order.log}.{number}") for number in range(order.replicas)
        ]
    elif order.workers:
        nodes = int(order.engine_arguments.get("nnodes", 1))
        sizes = order.engine_arguments.get("pipeline_parallel_size", 1)
        arguments = {
            **order.engine_arguments,
            "tensor_parallel_size": ranks // sizes,
            "distributed_executor_backend": "mp",
        }
        if nodes > 1:
            arguments |= {"master_addr": "127.0.0.1", "master_port": port}
        orders = [
            dataclasses.replace(
                order,
                engine_arguments={**arguments, "node_rank": node} if nodes > 1 else arguments,
                workers=FOLLOWER if node else LEADER,
                log=f"{order.log}.{node}",
            )
            for node in range(nodes)
        ]
    elif ranks > 1:
        sizes = (order.engine_arguments.get(f"{kind}_parallel_size", 1) for kind in ("pipeline", "data"))
        arguments = {
            **order.engine_arguments,
            "tensor_parallel_size": ranks // math.prod(sizes),
            "distributed_executor_backend": "external_launcher",
        }
        orders = [
            dataclasses.replace(
                order,
                engine_arguments=arguments,
                port=port,
                log=f"{order.log}.{rank}",
                environment={
                    **order.environment,
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                },
            )
            for rank in range(ranks)
        ]
    running = Instance(orders)
    try:
        yield running
    finally:
        running.end()


def in_a_process(action: Callable[..., None], *arguments: Any, log: Path) -> None:
    """Run ``action(*arguments)`` in a process of its own; its output goes to ``log``.

    Raises:
        RoleFailed: it raised; the text is its error.
    """
    context = multiprocessing.get_context("forkserver")
    connection, other = context.Pipe()
    process = context.Process(target=_run, args=(action, arguments, str(log), other), daemon=True)
    process.start()
    other.close()
    try:
        error: str = connection.recv()
    except EOFError:
        error = "ended without a result"
    process.join()
    if error:
        raise RoleFailed(f"{error}; see {log}")


def _run(action: Callable[..., None], arguments: tuple[Any, ...], log: str, connection: Connection) -> None:
    import sys
    import traceback

    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        action(*arguments)
    except BaseException as error:  # noqa: BLE001 - the caller raises it
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")
    else:
        connection.send("")


def platform_facts(work: Path) -> dict[str, Any]:
    """Collect the platform and the versions as vLLM sees them, in a process of its own.

    ``traits``: the platform's name, and what else of it decides what vLLM can run: ``cpu-without-amx``,
    ``without-torchvision``, ``phi-by-transformers`` (newer vLLM runs Phi by its Transformers backend).

    Raises:
        RoleFailed: vLLM does not come up.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / "platform.json"
    in_a_process(_write_facts, str(file), log=work / "platform.log")
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return facts


def _write_facts(file: str) -> None:
    import torch
    import transformers
    import vllm
    from vllm.platforms import current_platform

    from vllm_rfork import __version__

    name = str(current_platform.device_type)
    traits = [name]
    if name == "cpu" and not torch.cpu._is_amx_tile_supported():
        traits.append("cpu-without-amx")
    if importlib.util.find_spec("torchvision") is None:
        traits.append("without-torchvision")
    if importlib.util.find_spec("vllm.model_executor.models.phi") is None:
        traits.append("phi-by-transformers")
    facts = {
        "platform": name,
        "traits": traits,
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "device": f"{os.cpu_count()} cores, {platform.machine()}"
        if name == "cpu"
        else current_platform.get_device_name(),
        "visible_devices_variable": str(current_platform.device_control_env_var),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vllm_rfork": __version__,
    }
    Path(file).write_text(json.dumps(facts), encoding="utf-8")
