"""The first worker that ``vllm serve`` would start here, described by a process that makes vLLM's configuration."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import click
import msgspec

from vllm_rfork.cli.doctor_checks import is_worker_host
from vllm_rfork.cli.pairing import Worker
from vllm_rfork.logs.quoting import MAX_MESSAGE, printable

#: Importing vLLM takes 20 s on a slow processor, and reading a model's configuration from a hub some more.
BOUND_S = 300.0
_MODULE = "vllm_rfork.load.prediction"
#: Its ``REFUSED``, which cannot be imported here without torch.
_REFUSED = 3
_SHOWN_LINES = 5


class _Prediction(msgspec.Struct):
    key: str
    fingerprint: str
    facts: dict[str, str]
    planner: str = ""


def predicted(arguments: Sequence[str]) -> Worker:
    """The worker that ``vllm serve ARGUMENTS`` would start first.

    Raises:
        click.ClickException: vLLM is not installed, rejects the arguments, or has no configuration in time.
    """
    if not is_worker_host():
        raise click.ClickException(f"vLLM is not installed for {sys.executable}, so it cannot make a configuration")
    command = [sys.executable, "-m", _MODULE, *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - this very Python; the arguments are the user's own
            command, capture_output=True, text=True, errors="replace", check=False, timeout=BOUND_S
        )
    except subprocess.TimeoutExpired as error:
        raise click.ClickException(f"vLLM made no configuration within {BOUND_S:g} s") from error
    last = (done.stdout.splitlines() or [""])[-1]
    if done.returncode == _REFUSED:
        raise click.ClickException(printable(last, MAX_MESSAGE))
    try:
        found = msgspec.json.decode(last, type=_Prediction)
    except (msgspec.MsgspecError, ValueError) as error:
        said = (done.stderr or done.stdout).strip().splitlines()[-_SHOWN_LINES:]
        text = "\n".join(printable(line, MAX_MESSAGE) for line in said)
        raise click.ClickException(f"vLLM made no configuration of these arguments:\n{text}") from error
    return Worker(
        found.key, found.fingerprint, found.facts, f"facts of vllm serve {arguments[0]}", planner=found.planner
    )
