"""The demo's command, which prints each step as it happens: `make demo [ENGINE=nixl|yuanrong]`.

Exit codes: 0 everything as expected; 1 a server gave other answers, or got its weights from another source; 2 the demo
could not run; 130 interrupted. However it ends, it leaves no process behind.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from demo import milestones
from demo.asking import Answer, ask_all
from demo.elapsed import elapsed
from demo.model import build_model, copy_without_weights, weight_files
from demo.processes import DemoError
from demo.servers import ROOT, SERVED_NAME, STANDIN, Server, planner, rfork_options, server
from demo.verdict import ServerResult, complaints, report, why_forks_are_slower

BUILD = ROOT / "build"
RESULT = BUILD / "demo.json"
LOGS = BUILD / "demo"
CONSOLE = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line."""
    CONSOLE.print(text)


def result_of(name: str, running: Server) -> ServerResult:
    """Send all prompts to a running server and read its log."""
    with elapsed(f"{name} answers"):
        answers = tuple(ask_all(running.url, SERVED_NAME))
    log = running.process.text()
    for warning in milestones.warnings(log):
        say(f"   [yellow]{escape(warning)}[/yellow]")
    try:
        weights = milestones.weights(log)
    except DemoError as error:
        raise DemoError(f"server {name}: {error} (log: {running.process.log})") from error
    came_from = f"forked from [cyan]{weights.seed}[/cyan]" if weights.seed else "loaded from storage"
    say(f"   ready after {running.ready_s:.0f} s; weights {came_from}; answered {len(answers)} prompts")
    return ServerResult(name, weights, running.own_seed(), answers)


def play(engine: str) -> tuple[list[ServerResult], tuple[Answer, ...]]:
    """Run the five servers, at most two at a time; returns the four results, and the fifth server's answers.

    Raises:
        DemoError: something did not start, answer or end within its bounds.
    """
    full, bare, other = BUILD / "demo" / "model", BUILD / "demo" / "model-without-weights", BUILD / "demo" / "other"
    say("Making a random-weight Qwen2 model, its tokenizer, and another one with other weights")
    with elapsed("making models"):
        build_model(full, seed=1)
        build_model(other, seed=2)
        copy_without_weights(full, bare)
    if weight_files(bare):
        raise DemoError(f"{bare} contains weight files")
    megabytes = sum(path.stat().st_size for path in full.glob("*.safetensors")) / 1e6
    say(f"   {megabytes:.0f} MB of weights; the folder for B and C has none")

    with planner(LOGS) as plan:
        rfork = rfork_options(plan.url, engine)

        def start(name: str, model: Path, slot: int) -> Server:
            say(f"[bold]{name}[/bold]: vllm serve {escape(str(model.relative_to(ROOT)))} --load-format rfork")
            running = server(name, model, slot=slot, engine=engine, load_options=rfork, logs=LOGS)
            with elapsed(f"{name} starts"):
                return stack.enter_context(running)

        with ExitStack() as stack:
            a_server = start("A", full, 0)
            a = result_of("A", a_server)
            b_server = start("B", bare, 1)
            b = result_of("B", b_server)
            say("A is killed (kill -9)")
            a_server.process.kill()
            say(f"   the planner stops granting its seed after {plan.wait_without(a.own_seed):.1f} s")
            c = result_of("C", start("C", bare, 0))
            say("All are stopped")
        for result in (b, c):
            plan.wait_without(result.own_seed)
        with ExitStack() as stack:
            d = result_of("D", start("D", full, 0))
        say("A fifth server, with other weights")
        with ExitStack() as stack:
            with elapsed("it starts"):
                fifth = stack.enter_context(server("other", other, slot=0, engine=engine, load_options=[], logs=LOGS))
            with elapsed("it answers"):
                others = tuple(ask_all(fifth.url, SERVED_NAME))
    return [a, b, c, d], others


def table(results: list[ServerResult]) -> Table:
    """The table at the end."""
    shown = Table(title="Weights of four servers", box=box.HEAVY_HEAD if CONSOLE.is_terminal else box.ASCII)
    for heading in ("server", "source"):
        shown.add_column(heading)
    for heading in ("bytes", "seconds", "GB/s"):
        shown.add_column(heading, justify="right")
    shown.add_column("same answers?")
    names = {result.own_seed: result.name for result in results}
    for result in results:
        weights = result.weights
        rate = weights.nbytes / weights.weights_s / 1e9 if weights.weights_s > 0 else float("inf")
        same = "-" if result is results[0] else "yes" if result.answers == results[0].answers else "NO"
        source = f"fork from {names.get(weights.seed, weights.seed)}" if weights.seed else "storage"
        shown.add_row(result.name, source, f"{weights.nbytes:,}", f"{weights.weights_s:.3f}", f"{rate:.2f}", same)
    return shown


def write_result(document: dict[str, object]) -> None:
    """Write build/demo.json in one step."""
    part = RESULT.with_suffix(".part")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    part.replace(RESULT)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that every process is ended."""
    raise KeyboardInterrupt


@click.command()
@click.option("--engine", type=click.Choice(["nixl", "yuanrong"]), default="nixl", show_default=True)
def main(engine: str) -> None:
    """Fork a vLLM server's weights from a running one, and compare their answers."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    BUILD.mkdir(exist_ok=True)
    RESULT.unlink(missing_ok=True)
    try:
        if engine == "yuanrong" and not (STANDIN / "libascendcl.so").exists():
            raise DemoError("the stand-in for the Ascend data plane is not built: make standin")
        results, others = play(engine)
    except DemoError as error:
        CONSOLE.print(f"[red]The demo could not run:[/red] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        CONSOLE.print("Interrupted; every process was ended")
        sys.exit(130)
    write_result(report(engine, results))
    CONSOLE.print(table(results))
    if (reason := why_forks_are_slower(results)) is not None:
        CONSOLE.print(escape(reason))
    wrong = complaints(results, others)
    for complaint in wrong:
        CONSOLE.print(f"[red]WRONG[/red]: {escape(complaint)}")
    if wrong:
        sys.exit(1)
    CONSOLE.print(
        f"All four answers are equal, to the last bit; other weights give other answers. ({RESULT.relative_to(ROOT)})"
    )


if __name__ == "__main__":
    main()
