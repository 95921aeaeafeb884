"""``vllm-rfork key``: a worker's seed key from its parts, to find it in a planner or in a log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from vllm_rfork.cli.planner_api import json_option
from vllm_rfork.messages import MAX_KEY_LENGTH, SEED_KEY, encode_text
from vllm_rfork.seed_key import KV_BOTH, WorkerIdentity, build_seed_key

_RANK = click.IntRange(0)
_F = TypeVar("_F", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--kv-mode", default=KV_BOTH, show_default=True, help="kv_role of the worker's KV transfer"),
    click.option("--node-rank", type=_RANK, default=0, show_default=True),
    click.option("--tp-rank", type=_RANK, default=0, show_default=True),
    click.option("--pp-rank", type=_RANK, help="only with more than one pipeline stage"),
    click.option("--ep-rank", type=_RANK, help="only with expert parallelism, on a model with experts"),
    click.option("--draft", "is_draft", is_flag=True, help="key of the draft model of speculative decoding"),
    click.option("--separator", default="$", envvar="RFORK_SEED_KEY_SEPARATOR", show_default=True, show_envvar=True),
)


def key_options(command: _F) -> _F:
    """The options for the parts of a key besides ``model_url`` and the strategy, as :func:`key_of` takes them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def key_of(model_url: str, strategy: str, *, separator: str, **parts: Any) -> str:
    """The seed key of a worker.

    Args:
        parts: the fields of :class:`~vllm_rfork.seed_key.WorkerIdentity`.

    Raises:
        click.BadParameter: ``separator`` is one that workers reject.
        click.ClickException: planners would reject the key.
    """
    if not 1 <= len(separator) <= 16:
        raise click.BadParameter("must be 1 to 16 characters", param_hint="--separator")
    built = build_seed_key(model_url, strategy, WorkerIdentity(**parts), separator=separator)
    if len(built) > MAX_KEY_LENGTH:
        raise click.ClickException(f"the key has {len(built)} characters; planners accept at most {MAX_KEY_LENGTH}")
    return built


@click.command(epilog="Exit status: 0 printed; 1 planners would reject the key as too long; 2 wrong usage.")
@click.argument("model_url", envvar="MODEL_URL")
@click.argument("strategy", envvar="MODEL_DEPLOY_STRATEGY_NAME")
@key_options
@json_option
def key(model_url: str, strategy: str, as_json: bool, **parts: Any) -> None:
    """Print a worker's seed key from MODEL_URL, STRATEGY and its ranks.

    Both may also come from the environment variables MODEL_URL and MODEL_DEPLOY_STRATEGY_NAME.
    """
    built = key_of(model_url, strategy, **parts)
    if as_json:
        click.echo(msgspec.json.encode({"key": built, SEED_KEY: encode_text(built)}))
    else:
        click.echo(built)
