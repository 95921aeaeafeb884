"""The engines of ``python -m zoo.events``: their orders, and how they are started, driven and ended.

Must not import torch or vLLM: each engine is a process of its own, forked from the server of ``zoo.processes``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zoo import checkpoints, scenario_results
from zoo.case import Case
from zoo.catalogue import CATALOGUE
from zoo.planner import Planner
from zoo.processes import RoleFailed, in_a_process
from zoo.scenario_results import Sheet, Wrong
from zoo.scenario_updates import BACKEND
from zoo.scenario_worker import Part, Started, act
from zoo.workers import ENGINE_ARGUMENTS, GENERATE, Order


@dataclasses.dataclass
class Stage:
    """The settings and the shared state of all scenarios of a run."""

    sheet: Sheet
    planner: Planner
    facts: dict[str, Any]
    arguments: argparse.Namespace
    folder: Path
    other: Path
    starting: threading.Semaphore
    default: Started = dataclasses.field(default_factory=Started)

    @property
    def on_cpu(self) -> bool:
        """True on CPU, which has neither memory pools nor expandable segments."""
        return bool(self.facts["platform"] == "cpu")

    @property
    def timeout_s(self) -> float:
        """Limit of each step, in seconds."""
        return float(self.arguments.timeout)

    def order(self, name: str, *, load_format: str = "rfork", on_seeds: bool = False, **more: Any) -> Order:
        """Return the order of the process ``name``; ``more``: ``key``, ``options``, ``llm``, ``environment``."""
        arguments = {
            **ENGINE_ARGUMENTS,
            "weight_transfer_config": {"backend": BACKEND},
            "model": str(self.folder),
            "load_format": load_format,
        }
        if not self.on_cpu:
            arguments["gpu_memory_utilization"] = 0.4  # several engines share a device
        arguments.update({**json.loads(self.arguments.llm), **more.get("llm", {})})
        if load_format == "rfork":
            arguments["model_loader_extra_config"] = {
                "model_url": more.get("key", name),
                "model_deploy_strategy_name": "events",
                "rfork_scheduler_url": self.planner.url,
                "rfork_seed_advertise_host": "127.0.0.1",
                "rfork_seed_bind_host": "127.0.0.1",
                "rfork_heartbeat_interval_sec": 1.0,
                "rfork_engine": self.arguments.engine,
                **plugin_options(self.arguments.option),
                **more.get("options", {}),
            }
        devices = self.arguments.seed_devices if on_seeds else self.arguments.receiver_devices
        visible = {str(self.facts["visible_devices_variable"]): devices} if devices else {}
        log = self.arguments.work / "logs" / name.replace(" ", "-")
        return Order(
            engine_arguments=arguments,
            asks=GENERATE,
            log=str(log.resolve()),
            environment={**visible, **more.get("environment", {})},
        )

    def right(self, started: Started, who: str) -> str:
        """Describe how ``started`` equals the default load, in tensors and answers; raise Wrong if it does not."""
        layout = scenario_results.layout_of(started.lines)
        return scenario_results.equal(
            (self.default.loads, self.default.answers), (started.loads, started.answers), layout, who
        )


def made(arguments: argparse.Namespace, sheet: Sheet, planner: Planner, facts: dict[str, Any]) -> Stage:
    """Make the checkpoints and the stage of a run; at most ``--jobs`` engines start at once, by default 4, on CPU 2."""
    on_cpu = facts["platform"] == "cpu"
    (llama,) = (case for case in CATALOGUE if case.name == "llama")
    case = llama.scaled(arguments.scale or (1 if on_cpu else 16))
    folder, other = (arguments.work.resolve() / name for name in ("model", "other"))
    log = arguments.work / "logs" / "make"
    in_a_process(checkpoints.make, case, folder, log=log)
    in_a_process(_make_other, case, other, log=log)
    starting = threading.Semaphore(arguments.jobs or (2 if on_cpu else 4))
    return Stage(sheet, planner, facts, arguments, folder, other, starting)


def _make_other(case: Case, folder: Path) -> None:
    """Make the same model with other weights."""
    import transformers

    if (folder / "config.json").exists():
        recipe = (folder / checkpoints.MARKER).read_text(encoding="utf-8")
        if recipe == case.recipe():
            return
    model_class = getattr(transformers, case.model_class)
    config = model_class.config_class(**case.settings)
    checkpoints.save(model_class, config, folder, checkpoints.SEED + 1, device=checkpoints.maker_device())
    (folder / checkpoints.MARKER).write_text(case.recipe(), encoding="utf-8")


class Actor:
    """One running engine; used by one thread at a time."""

    def __init__(self, part: Part) -> None:

        context = multiprocessing.get_context("forkserver")
        self._log = part.order.log
        self._lost = ""
        self._connection, other = context.Pipe()
        self.process = context.Process(target=act, args=(part, other), daemon=True)
        self.process.start()
        other.close()

    def wait(self, timeout_s: float) -> Any:
        """Return its next message.

        Raises:
            RoleFailed: it ended, or sent nothing for ``timeout_s`` seconds.
        """
        if self._lost:  # a late answer would be taken for the next one
            raise RoleFailed(self._lost)
        try:
            if self._connection.poll(timeout_s):
                return self._connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            self._lost = f"exit code {self.process.exitcode}; see {self._log}"
        else:
            self._lost = f"no message within {timeout_s:g} s; see {self._log}"
        raise RoleFailed(self._lost)

    def stopped(self, timeout_s: float) -> None:
        """Wait until it stops at the point that its part defines.

        Raises:
            RoleFailed: as :meth:`wait`.
            Wrong: it started without reaching that point.
        """
        if isinstance(saw := self.wait(timeout_s), Started):
            raise Wrong(f"it never came there: {saw.error or scenario_results.warnings(saw.lines)}")

    def go(self) -> None:
        """Let it continue."""
        self._connection.send("go")

    def tell(self, timeout_s: float, command: str, *arguments: Any) -> Any:
        """Send a command and return the answer.

        Raises:
            RoleFailed: as :meth:`wait`.
            Wrong: the command raised.
        """
        with contextlib.suppress(OSError):  # it has ended, and waiting reports that
            self._connection.send((command, *arguments))
        kind, value = self.wait(timeout_s)
        if kind == "error":
            raise Wrong(f"{command}: {value}")
        return value

    def kill(self) -> None:
        """Kill it without a chance to clean up."""
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10)

    def end(self) -> None:
        """Let it withdraw and exit; kill it if it does not."""
        with contextlib.suppress(OSError):
            self._connection.send("end")
        self.process.join(15)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self._connection.close()


@contextlib.contextmanager
def actor(part: Part) -> Iterator[Actor]:
    """Run an engine; end it after the block."""
    running = Actor(part)
    try:
        yield running
    finally:
        running.end()


@contextlib.contextmanager
def started(stage: Stage, part: Part, times: float = 1.0) -> Iterator[tuple[Actor, Started]]:
    """Run an engine, and yield it with its start; at most ``--jobs`` start at once.

    Raises:
        RoleFailed: it did not come up.
    """
    with contextlib.ExitStack() as stack:
        with stage.starting:
            running = stack.enter_context(actor(part))
            saw: Started = running.wait(stage.timeout_s * times)
        if saw.error:
            raise RoleFailed(f"{saw.error}; see {part.order.log}")
        yield running, saw


def plugin_options(given: list[str]) -> dict[str, Any]:
    """Parse the arguments of ``--option``."""
    pairs = (text.partition("=") for text in given)
    return {name: json.loads(value) for name, _, value in pairs}
