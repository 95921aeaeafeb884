"""``vllm-rfork drain`` and ``vllm-rfork lift``: orders of an operator about one seed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from vllm_rfork.cli.planner_api import ask_json, echo_json, json_option, planner_options
from vllm_rfork.cli.seconds import Seconds
from vllm_rfork.cli.seed_entries import duration, lists_of, whole
from vllm_rfork.clients.calls import key_headers
from vllm_rfork.logs.quoting import counted, printable
from vllm_rfork.messages import DEBUG_SNAPSHOT, DRAIN, LIFT, UNDO, BadMessage, SeedAddress, parse_seed_address

_POLL_S = 1.0


class SeedName(click.ParamType[SeedAddress]):
    """A seed as ``vllm-rfork seeds`` prints it: ``ip:port:rank``."""

    name = "ip:port:rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> SeedAddress:
        """The address in ``value``."""
        try:
            return parse_seed_address(str(value))
        except BadMessage as error:
            self.fail(f"expected ip:port:rank, as `vllm-rfork seeds` prints it ({error})", param, ctx)


_seed = click.argument("seed", type=SeedName(), metavar="SEED")
_key = click.option("--key", required=True, help="seed key under which the seed is announced")


@click.command(epilog="Exit status: 0 done; 1 refused, or leases were left when --within was over; 2 wrong usage.")
@_seed
@_key
@click.option("--undo", is_flag=True, help="end the drain")
@click.option("--wait", is_flag=True, help="return when no lease is left")
@click.option(
    "--within",
    "within_s",
    type=Seconds(0, 86_400),
    default=900.0,
    show_default=True,
    help="seconds to wait at most, with --wait",
)
@planner_options
@json_option
def drain(  # noqa: PLR0917 - click passes them by name
    seed: SeedAddress,
    key: str,
    undo: bool,
    wait: bool,
    within_s: float,
    url: str | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Grant SEED (ip:port:rank) to no receiver any more; its leases end as usual.

    The drain lasts until --undo, or until the seed announces another epoch, as it does after a restart. The planner
    must have a token.
    """
    if undo and wait:
        raise click.UsageError("--undo and --wait exclude each other")
    found = _order(url, DRAIN, seed, key, timeout_s, **({UNDO: "1"} if undo else {}))
    leases = found.get("leases")
    state = "not draining any more" if undo else "draining"
    if not as_json:
        left = "an unknown number of leases" if (number := whole(leases)) is None else counted(number, "lease")
        click.echo(f"seed {seed} is {state}, {left} left")
    if wait and leases != 0:
        leases = _wait(url, seed, key, timeout_s, within_s)
        if not as_json:
            click.echo(f"seed {seed} is draining, 0 leases left")
    if as_json:
        echo_json({**found, "leases": leases})


@click.command(epilog="Exit status: 0 done, also if it was not quarantined; 1 refused; 2 wrong usage.")
@_seed
@_key
@planner_options
@json_option
def lift(seed: SeedAddress, key: str, url: str | None, timeout_s: float, as_json: bool) -> None:
    """End the quarantine of SEED (ip:port:rank), and forget the failures that led to it.

    The planner must have a token.
    """
    found = _order(url, LIFT, seed, key, timeout_s)
    if as_json:
        echo_json(found)
    elif found.get("was_quarantined"):
        click.echo(f"seed {seed} is not quarantined any more")
    else:
        click.echo(f"seed {seed} was not quarantined")


def _order(url: str | None, path: str, seed: SeedAddress, key: str, timeout_s: float, **more: str) -> dict[str, Any]:
    """The planner's answer to an order about ``seed``. Raises ClickException if it refuses."""
    headers = {**key_headers(key, ""), **seed.headers(), **more}
    return ask_json(url, path, timeout_s=timeout_s, method="POST", headers=headers)


def _wait(url: str | None, seed: SeedAddress, key: str, timeout_s: float, within_s: float) -> int:
    """Wait until ``seed`` has no lease, or is gone; returns 0. Raises ClickException at the bound."""
    until = time.monotonic() + within_s
    while (entry := _entry(url, seed, key, timeout_s)) is not None:
        leases = entry.get("leases")
        if not entry.get("draining"):
            raise click.ClickException(f"seed {seed} is not draining any more: the drain was undone, or it restarted")
        if leases == 0:
            break
        if time.monotonic() >= until:
            raise click.ClickException(
                f"seed {seed} still has {printable(leases)} leases after {duration(within_s)}; it goes on draining"
            )
        time.sleep(_POLL_S)
    return 0


def _entry(url: str | None, seed: SeedAddress, key: str, timeout_s: float) -> Mapping[str, Any] | None:
    """The planner's entry of ``seed``; None if it has dropped it."""
    snapshot = ask_json(url, DEBUG_SNAPSHOT, timeout_s=timeout_s, params={"key": key, "limit": "100000"})
    return next((each for each in lists_of(snapshot, "seeds")["seeds"] if each.get("seed") == str(seed)), None)
