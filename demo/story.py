"""The demo's servers, one after the other, each step printed as it happens."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from rich.markup import escape

from demo import milestones
from demo.asking import Answer, ask_all
from demo.elapsed import elapsed
from demo.model import build_model, copy_without_weights, weight_files
from demo.processes import DemoError
from demo.screen import Screen
from demo.servers import (
    ROOT,
    SERVED_NAME,
    THROTTLED_VLLM,
    VLLM,
    Planner,
    Server,
    planner,
    rfork_options,
    server,
)
from demo.verdict import ServerResult

BUILD = ROOT / "build"
LOGS = BUILD / "demo"


class Story:
    """The demo's servers, one after the other.

    Args:
        engine: the transfer engine of all servers.
        mb_per_s: the rate of A's storage.
    """

    def __init__(self, engine: str, mb_per_s: float, screen: Screen) -> None:
        self._engine, self._mb_per_s, self._screen = engine, mb_per_s, screen
        self._full, self._bare, self._other = (LOGS / name for name in ("model", "model-without-weights", "other"))

    def play(self) -> tuple[list[ServerResult], tuple[Answer, ...]]:
        """Run the five servers, at most two at a time; returns the four results, and the fifth server's answers.

        Raises:
            DemoError: something did not start, answer or end within its bounds.
        """
        self._make_models()
        with planner(LOGS) as plan:
            self._screen.say(f"A planner is running; its dashboard, until D has ended: [cyan]{plan.url}/[/cyan]")
            a, b, c = self._forks(plan)
            for result in (b, c):
                plan.wait_without(result.own_seed)
            with ExitStack() as stack:
                d = self._result("D", self._start(stack, "D", self._full, plan))
        self._screen.say("A fifth server, with other weights")
        with ExitStack() as stack:
            fifth = server("other", self._other, slot=0, engine=self._engine, load_options=[], logs=LOGS)
            with elapsed("it starts", self._screen.console):
                url = stack.enter_context(fifth).url
            with elapsed("it answers", self._screen.console):
                others = tuple(ask_all(url, SERVED_NAME))
        return [a, b, c, d], others

    def _make_models(self) -> None:
        self._screen.say("Making a random-weight Qwen2 model, its tokenizer, and another one with other weights")
        with elapsed("making models", self._screen.console):
            build_model(self._full, seed=1)
            build_model(self._other, seed=2)
            copy_without_weights(self._full, self._bare)
        if weight_files(self._bare):
            raise DemoError(f"{self._bare} contains weight files")
        megabytes = sum(path.stat().st_size for path in self._full.glob("*.safetensors")) / 1e6
        self._screen.say(f"   {megabytes:.0f} MB of weights; the folder for B and C has none")

    def _forks(self, plan: Planner) -> tuple[ServerResult, ServerResult, ServerResult]:
        """A from throttled storage, B from A, A killed, C from B; all are stopped."""
        with ExitStack() as stack:
            a_server = self._start(stack, "A", self._full, plan, throttled=True)
            a = self._result("A", a_server, self._mb_per_s)
            b = self._result("B", self._start(stack, "B", self._bare, plan, slot=1))
            self._screen.say("A is killed (kill -9)")
            a_server.process.kill()
            waited_s = plan.wait_without(a.own_seed)
            self._screen.say(f"   the planner stops granting its seed after {waited_s:.1f} s")
            c = self._result("C", self._start(stack, "C", self._bare, plan))
            self._screen.say("All are stopped")
        return a, b, c

    def _start(
        self, stack: ExitStack, name: str, model: Path, plan: Planner, *, slot: int = 0, throttled: bool = False
    ) -> Server:
        """Start `vllm serve` with the options of docs/options.md; ``stack`` ends it."""
        self._screen.say(f"[bold]{name}[/bold]: vllm serve {escape(str(model.relative_to(ROOT)))} --load-format rfork")
        if throttled:
            self._screen.say(
                f"   storage is throttled to {self._mb_per_s:g} MB/s ({self._mb_per_s / 125:g} Gbit/s): its loader "
                "waits after each tensor until the bytes so far fit that rate"
            )
        running = server(
            name,
            model,
            slot=slot,
            engine=self._engine,
            load_options=rfork_options(plan.url, self._engine, self._mb_per_s if throttled else None),
            logs=LOGS,
            program=THROTTLED_VLLM if throttled else VLLM,
        )
        with elapsed(f"{name} starts", self._screen.console):
            return stack.enter_context(running)

    def _result(self, name: str, running: Server, mb_per_s: float | None = None) -> ServerResult:
        """Send all prompts to a running server and read its log."""
        with elapsed(f"{name} answers", self._screen.console):
            answers = tuple(ask_all(running.url, SERVED_NAME))
        log = running.process.text()
        for warning in milestones.warnings(log):
            self._screen.say(f"   [yellow]{escape(warning)}[/yellow]")
        try:
            weights = milestones.weights(log)
        except DemoError as error:
            raise DemoError(f"server {name}: {error} (log: {running.process.log})") from error
        came_from = f"forked from [cyan]{weights.seed}[/cyan]" if weights.seed else "loaded from storage"
        self._screen.say(
            f"   ready after {running.ready_s:.0f} s; weights {came_from}; answered {len(answers)} prompts"
        )
        return ServerResult(name, weights, running.own_seed(), answers, mb_per_s)
