"""``vllm-rfork explain``: why a worker pairs with the seeds of its key, or does not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from vllm_rfork.cli.key import key_of, key_options
from vllm_rfork.cli.pairing import Answer, Compared, Worker, answer, compare
from vllm_rfork.cli.planner_api import URL_VARIABLE, ask_json, credentials, echo_json, json_option, planner_options
from vllm_rfork.cli.predicted import predicted
from vllm_rfork.cli.seed_entries import lists_of
from vllm_rfork.cli.tables import print_lines
from vllm_rfork.clients import SeedClient
from vllm_rfork.errors import SeedError
from vllm_rfork.messages import DEBUG_SNAPSHOT, BadMessage, parse_seed_address

_MAX_FILE_NBYTES = 4 << 20
_MAX_SEEDS = 1000
#: The exit status for each value of ``Answer.pairs``.
_STATUS = {True: 0, False: 1, None: 2}


class _CannotTell(click.ClickException):
    exit_code = _STATUS[None]


class _Saved(msgspec.Struct):
    """The part of this command's JSON output that describes the worker."""

    facts: dict[str, str]
    fingerprint: str = ""
    key: str = ""
    epoch: str = ""


@click.command(epilog="Exit status: 0 the worker pairs with a seed; 1 it does not; 2 cannot tell, or wrong usage.")
@planner_options
@click.option("--model-url", envvar="MODEL_URL", show_envvar=True, help="model_url of the worker")
@click.option("--strategy", envvar="MODEL_DEPLOY_STRATEGY_NAME", show_envvar=True, help="its deployment strategy")
@key_options
@click.option("--key", help="its seed key, instead of the parts")
@click.option("--worker", "at", metavar="HOST:PORT", help="compare the running worker with this seed service")
@click.option("--facts", "file", metavar="FILE", help="compare the worker that FILE describes: output of --json")
@click.argument("serve", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGUMENTS OF VLLM SERVE]")
@json_option
@click.pass_context
def explain(ctx: click.Context, /, **given: Any) -> None:
    """Explain why a worker pairs with the seeds of its key, or does not.

    The worker is a running one (--worker), a file describes it (--facts), or it is the first worker that "vllm serve"
    would start here with the ARGUMENTS after "--": vLLM makes its configuration, and no engine is started. Each seed
    with another fingerprint is asked for its facts, and those that differ are named. Without a planner, --json prints
    the description of the worker for --facts.
    """
    try:
        ctx.exit(_explain(**given))
    except click.UsageError:
        raise
    except click.ClickException as error:
        raise _CannotTell(error.message) from error


def _explain(*, url: str | None, timeout_s: float, as_json: bool, **given: Any) -> int:
    """Print the comparison; returns the exit status."""
    worker = _worker(timeout_s, **given)
    url = url or worker.planner
    if not url and not as_json:
        raise click.UsageError(f"no planner is given; use --url http://host:1223, or set {URL_VARIABLE}")
    if not url:
        echo_json(_described(worker))
        return 0
    entries = _seeds(url, timeout_s, key=worker.key)
    compared = asyncio.run(compare(worker, entries, _client(timeout_s)))
    conclusion = answer(worker, compared)
    near = [] if entries else _near_keys(worker.key, _seeds(url, timeout_s))
    if as_json:
        found = {"seeds": [_seed(each) for each in compared], "answer": dataclasses.asdict(conclusion)}
        echo_json({**_described(worker), **found, "near_keys": near})
    else:
        _print(worker, compared, conclusion, near)
    return _STATUS[conclusion.pairs]


def _worker(
    timeout_s: float,
    *,
    serve: Sequence[str],
    at: str | None,
    file: str | None,
    key: str | None,
    model_url: str,
    strategy: str,
    **parts: Any,
) -> Worker:
    """The worker that the options describe.

    Raises:
        click.UsageError: its key is missing, or the options contradict each other.
        click.ClickException: the worker or the file cannot be read.
    """
    if sum(map(bool, (at, file, serve))) > 1:
        raise click.UsageError("--worker, --facts and arguments of vllm serve describe one worker; give one of them")
    if serve:
        return predicted(serve)
    saved = None if file is None else _saved(file)
    if key is None and model_url and strategy:
        key = key_of(model_url, strategy, **parts)
    key = key or (saved.key if saved else "")
    if not key:
        raise click.UsageError("the worker's key is missing; give --model-url and --strategy, or --key")
    if saved is not None:
        return Worker(key, saved.fingerprint, saved.facts, f"facts in {file}", epoch=saved.epoch)
    return Worker(key) if at is None else _running(at, key, timeout_s)


def _saved(file: str) -> _Saved:
    """The worker in ``file``: JSON of this command, or facts alone, as a seed publishes them."""
    try:
        with Path(file).open("rb") as opened:
            data = opened.read(_MAX_FILE_NBYTES + 1)
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{file} cannot be read: {error}") from error
    if len(data) > _MAX_FILE_NBYTES:
        raise click.UsageError(f"{file} has more than {_MAX_FILE_NBYTES} bytes")
    unusable = (msgspec.MsgspecError, ValueError, RecursionError)
    with contextlib.suppress(*unusable):
        return msgspec.json.decode(data, type=_Saved)
    with contextlib.suppress(*unusable):
        return _Saved(msgspec.json.decode(data, type=dict[str, str]))
    raise click.UsageError(f"{file} contains no facts: it must be an output of vllm-rfork explain --json")


def _running(at: str, key: str, timeout_s: float) -> Worker:
    """The worker whose seed service is at ``at``."""
    client = _client(timeout_s)
    try:
        address = parse_seed_address(f"{at}:0")
    except BadMessage as error:
        raise click.BadParameter(f"{at!r} is not HOST:PORT", param_hint="--worker") from error

    async def ask() -> Worker:
        identity = await client.identify(address, key)
        facts = await client.facts(address, key)
        return Worker(key, identity.fingerprint, facts, f"facts of {at}", address, identity.epoch)

    try:
        return asyncio.run(ask())
    except SeedError as error:
        raise click.ClickException(f"the worker cannot be read: {error}") from error


def _client(timeout_s: float) -> SeedClient:
    return SeedClient(request_timeout_s=timeout_s, credentials=credentials())


def _seeds(url: str, timeout_s: float, **narrowed: str) -> list[dict[str, Any]]:
    params = {"limit": str(_MAX_SEEDS), **narrowed}
    return lists_of(ask_json(url, DEBUG_SNAPSHOT, timeout_s=timeout_s, params=params), "seeds")["seeds"]


def _near_keys(key: str, entries: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of other seeds that resemble ``key``, the nearest first."""
    return difflib.get_close_matches(key, sorted({str(each.get("key", "")) for each in entries}), n=3, cutoff=0.6)


def _seed(compared: Compared) -> dict[str, Any]:
    return {
        "seed": compared.seed,
        "result": compared.result,
        "text": compared.text,
        "differences": [each._asdict() for each in compared.differences],
    }


def _described(worker: Worker) -> dict[str, Any]:
    return {
        "key": worker.key,
        "fingerprint": worker.fingerprint,
        "epoch": worker.epoch,
        "source": worker.source,
        "facts": worker.facts,
    }


def _print(worker: Worker, compared: Sequence[Compared], conclusion: Answer, near: Sequence[str]) -> None:
    pairs = sum(each.result == "pairs" for each in compared)
    others = sum(each.result != "itself" for each in compared) - pairs
    verb = "pairs" if pairs == 1 else "pair"
    shown = f"{worker.fingerprint or 'not known'}" + (f"  ({worker.source})" if worker.source else "")
    print_lines(
        [
            ("key", worker.key),
            ("fingerprint", shown),
            ("seeds", f"{len(compared)} with this key: {pairs} {verb}, {others} {'does' if others == 1 else 'do'} not"),
            *(("near key", each) for each in near),
        ]
    )
    print_lines([(each.seed, each.result, each.text) for each in compared])
    print_lines([("answer", conclusion.text)])
