"""The demo's command, which prints each step as it happens: `make demo [ENGINE=nixl|yuanrong]`.

Exit codes: 0 everything as expected; 1 a server gave other answers, or got its weights from another source; 2 the demo
could not run; 130 interrupted. However it ends, it leaves no process behind.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from types import FrameType

import click
from rich.markup import escape
from rich.table import Table

from demo import throttle
from demo.asking import Answer
from demo.processes import DemoError
from demo.screen import Screen
from demo.servers import ROOT, STANDIN
from demo.story import BUILD, Story
from demo.verdict import ServerResult, complaints, explanation, report

RESULT = BUILD / "demo.json"
NEXT = """\
[bold]Next[/bold]
   the transfer engines of this machine: .venv/bin/vllm-rfork doctor
   your own model: docs/quick-start, one page for each platform
   the same in containers: deploy/images/compose.yaml"""


def table(results: list[ServerResult]) -> Table:
    """The table at the end."""
    shown = Table(title="Weights of four servers")
    for heading in ("server", "source"):
        shown.add_column(heading)
    for heading in ("MB", "seconds", "GB/s"):
        shown.add_column(heading, justify="right")
    shown.add_column("answers")
    names = {result.own_seed: result.name for result in results}
    for result in results:
        weights = result.weights
        rate = weights.nbytes / weights.weights_s / 1e9 if weights.weights_s > 0 else float("inf")
        same = "-" if result is results[0] else "equal" if result.answers == results[0].answers else "DIFFER"
        storage = "storage, page cache" if result.mb_per_s is None else f"storage throttled to {result.mb_per_s:g} MB/s"
        source = f"fork from {names.get(weights.seed, weights.seed)}" if weights.seed else storage
        shown.add_row(
            result.name, source, f"{weights.nbytes / 1e6:.0f}", f"{weights.weights_s:.3f}", f"{rate:.2f}", same
        )
    return shown


def write_result(document: dict[str, object]) -> None:
    """Write build/demo.json in one step."""
    part = RESULT.with_suffix(".part")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    part.replace(RESULT)


def conclude(results: list[ServerResult], others: tuple[Answer, ...], screen: Screen) -> bool:
    """Print the table, its explanation and the verdict; returns True if everything is as expected."""
    screen.show(table(results))
    if (reason := explanation(results)) is not None:
        screen.say(reason)
    wrong = complaints(results, others)
    for complaint in wrong:
        screen.say(f"[red]WRONG[/red]: {escape(complaint)}")
    if not wrong:
        screen.say(
            "[green]All four answers are equal, to the last bit; other weights give other answers.[/green] "
            f"({RESULT.relative_to(ROOT)})"
        )
        screen.say(NEXT)
    return not wrong


def _terminate(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP unwind as Ctrl-C does, so that every process is ended."""
    raise KeyboardInterrupt


@click.command()
@click.option("--engine", type=click.Choice(["nixl", "yuanrong"]), default="nixl", show_default=True)
@click.option(
    "--storage-mb-per-s",
    "mb_per_s",
    type=click.FloatRange(min=1),
    default=throttle.DEFAULT_RATE,
    show_default=True,
    help="Rate to which the first server's storage is throttled.",
)
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Write the output to an SVG file.")
def main(engine: str, mb_per_s: float, picture: Path | None) -> None:
    """Fork a vLLM server's weights from a running one, and compare their answers."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminate)
    BUILD.mkdir(exist_ok=True)
    RESULT.unlink(missing_ok=True)
    screen = Screen()
    try:
        if engine == "yuanrong" and not (STANDIN / "libascendcl.so").exists():
            raise DemoError("the stand-in for the Ascend data plane is not built: make standin")
        results, others = Story(engine, mb_per_s, screen).play()
    except DemoError as error:
        screen.say(f"[red]The demo could not run:[/red] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        screen.say("Interrupted; every process was ended")
        sys.exit(130)
    write_result(report(engine, results))
    as_expected = conclude(results, others, screen)
    if picture is not None:
        screen.save(picture, title="make demo")
    if not as_expected:
        sys.exit(1)


if __name__ == "__main__":
    main()
