"""``vllm-rfork key``: a worker's seed key from its parts, to find it in a planner or in a log."""

from __future__ import annotations

import click
import msgspec

from vllm_rfork.cli.planner_api import json_option
from vllm_rfork.messages import MAX_KEY_LENGTH, SEED_KEY, encode_text
from vllm_rfork.seed_key import KV_BOTH, WorkerIdentity, build_seed_key

_RANK = click.IntRange(0)


@click.command()
@click.argument("model_url", envvar="MODEL_URL")
@click.argument("strategy", envvar="MODEL_DEPLOY_STRATEGY_NAME")
@click.option("--kv-mode", default=KV_BOTH, show_default=True, help="kv_role of the worker's KV transfer")
@click.option("--node-rank", type=_RANK, default=0, show_default=True)
@click.option("--tp-rank", type=_RANK, default=0, show_default=True)
@click.option("--pp-rank", type=_RANK, help="only with more than one pipeline stage")
@click.option("--ep-rank", type=_RANK, help="only with expert parallelism, on a model with experts")
@click.option("--draft", is_flag=True, help="key of the draft model of speculative decoding")
@click.option("--separator", default="$", envvar="RFORK_SEED_KEY_SEPARATOR", show_default=True, show_envvar=True)
@json_option
def key(  # noqa: PLR0917 - click passes them by name
    model_url: str,
    strategy: str,
    kv_mode: str,
    node_rank: int,
    tp_rank: int,
    pp_rank: int | None,
    ep_rank: int | None,
    draft: bool,
    separator: str,
    as_json: bool,
) -> None:
    """Print a worker's seed key from MODEL_URL, STRATEGY and its ranks.

    Both may also come from the environment variables MODEL_URL and MODEL_DEPLOY_STRATEGY_NAME.
    """
    if not 1 <= len(separator) <= 16:
        raise click.BadParameter("must be 1 to 16 characters", param_hint="--separator")
    identity = WorkerIdentity(kv_mode, node_rank, tp_rank, pp_rank, ep_rank, draft)
    built = build_seed_key(model_url, strategy, identity, separator=separator)
    if len(built) > MAX_KEY_LENGTH:
        raise click.ClickException(f"the key has {len(built)} characters; planners accept at most {MAX_KEY_LENGTH}")
    if as_json:
        click.echo(msgspec.json.encode({"key": built, SEED_KEY: encode_text(built)}))
    else:
        click.echo(built)
