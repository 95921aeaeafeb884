"""``vllm-rfork seeds`` and ``vllm-rfork leases``: a planner's state as tables or JSON.

They read ``/debug/snapshot``. A third-party planner may answer it in another form, which is an error here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from vllm_rfork.cli.planner_api import ask_json, echo_json, json_option, planner_options
from vllm_rfork.cli.seconds import Seconds
from vllm_rfork.cli.seed_entries import duration, lists_of, seconds_of, seed_state
from vllm_rfork.cli.tables import on_terminal, print_table
from vllm_rfork.cli.watch import watch
from vllm_rfork.logs.quoting import counted
from vllm_rfork.messages import DEBUG_SNAPSHOT

_Row = Mapping[str, Any]
_Column = tuple[str, Callable[[_Row], object]]

_limit = click.option(
    "--limit", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="maximum number of entries"
)
_key = click.option("--key", help="only this seed key")
_STATUS = "Exit status: 0 listed; 1 the planner did not answer or refused; 2 wrong usage."


@click.command(epilog=_STATUS)
@planner_options
@_key
@_limit
@click.option(
    "--watch",
    "every_s",
    is_flag=False,
    flag_value=2.0,
    type=Seconds(0.5, 3600),
    metavar="[SECONDS]",
    help="repeat every SECONDS until Ctrl-C  [2 without a number]",
)
@json_option
def seeds(  # noqa: PLR0917 - click passes them by name
    url: str | None, timeout_s: float, key: str | None, limit: int, every_s: float | None, as_json: bool
) -> None:
    """List the planner's seeds."""

    def fetch() -> list[dict[str, Any]]:
        found = ask_json(url, DEBUG_SNAPSHOT, timeout_s=timeout_s, params=_narrowed(key, limit))
        return lists_of(found, "seeds")["seeds"]

    def show(found: list[dict[str, Any]]) -> None:
        if as_json:
            echo_json(found)
        else:
            _print_table("seed", _SEED_COLUMNS, found, limit)

    if every_s is None:
        show(fetch())
    else:
        watch(fetch, show, every_s)


@click.command(epilog=_STATUS)
@planner_options
@_key
@_limit
@json_option
def leases(url: str | None, timeout_s: float, key: str | None, limit: int, as_json: bool) -> None:
    """List current leases, waiting receivers and pending loaders.

    Only the first characters of lease ids are shown: a complete id is enough to release the lease.
    """
    answer = ask_json(url, DEBUG_SNAPSHOT, timeout_s=timeout_s, params=_narrowed(key, limit))
    found = lists_of(answer, "leases", "waiting", "intents")
    if as_json:
        echo_json(found)
        return
    _print_table("lease", _LEASE_COLUMNS, found["leases"], limit)
    if found["waiting"]:
        click.echo()
        _print_table("waiting receiver", _WAITING_COLUMNS, found["waiting"], limit)
    if found["intents"]:
        click.echo()
        _print_table("pending loader", _INTENT_COLUMNS, found["intents"], limit)


def _narrowed(key: str | None, limit: int) -> dict[str, str]:
    return {"limit": str(limit), **({} if key is None else {"key": key})}


def _print_table(noun: str, columns: Sequence[_Column], rows: Sequence[_Row], limit: int) -> None:
    if not rows and on_terminal():
        click.echo(f"no {noun}s")
        return
    more = " (there may be more; see --limit)" if len(rows) >= limit else ""
    cells = [[value(row) for _, value in columns] for row in rows]
    print_table([name for name, _ in columns], cells, title=counted(len(rows), noun) + more)


def _plain(name: str) -> Callable[[_Row], object]:
    return lambda row: row.get(name)


def _age(name: str) -> Callable[[_Row], object]:
    def age(row: _Row) -> object:
        seconds = seconds_of(row, name)
        return None if seconds is None else duration(seconds)

    return age


def _labels(row: _Row) -> str:
    labels = row.get("labels")
    return " ".join(f"{name}={value}" for name, value in labels.items()) if isinstance(labels, dict) else ""


_SEED_COLUMNS: tuple[_Column, ...] = (
    ("key", _plain("key")),
    ("seed", _plain("seed")),
    ("state", seed_state),
    ("leases", lambda row: f"{row.get('leases', '?')} of {row.get('slots', '?')}"),
    ("failures", _plain("failures")),
    ("seen", _age("seen_s_ago")),
    ("age", _age("age_s")),
    ("labels", _labels),
    ("fingerprint", lambda row: str(row.get("fingerprint", ""))[:12]),
)
_LEASE_COLUMNS: tuple[_Column, ...] = (
    ("key", _plain("key")),
    ("receiver", _plain("receiver")),
    ("reads from", _plain("seed")),
    ("since", _age("held_s")),
    ("ends in", _age("expires_in_s")),
    ("lease", _plain("lease")),
)
_WAITING_COLUMNS: tuple[_Column, ...] = (
    ("key", _plain("key")),
    ("place", _plain("place")),
    ("receiver", _plain("receiver")),
    ("waited", _age("waited_s")),
    ("of at most", _age("wait_s")),
)
_INTENT_COLUMNS: tuple[_Column, ...] = (("key", _plain("key")), ("worker", _plain("intent")))
