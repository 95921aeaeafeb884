"""Entries of a snapshot that another program sent in another form, and numbers of seconds."""

from __future__ import annotations

import asyncio
from typing import Any

import click
import pytest

from vllm_rfork.cli import fleet
from vllm_rfork.cli.main import main
from vllm_rfork.cli.pairing import Worker, compare
from vllm_rfork.cli.seconds import Seconds
from vllm_rfork.cli.seed_entries import seed_state, whole
from vllm_rfork.clients import SeedClient
from vllm_rfork.messages import SeedAddress

NO_SECONDS = ("x", True, [1], {"a": 1}, float("nan"), float("inf"), -1, 1e308, 10**400)


@pytest.mark.parametrize("value", NO_SECONDS)
def test_values_that_are_no_seconds_are_left_out(value: object) -> None:
    assert seed_state({"aside_s": value, "held_s": value}) == "serving"
    cells = [cell({"seen_s_ago": value, "age_s": value, "leases": value}) for _, cell in fleet._SEED_COLUMNS]
    assert cells[5:7] == [None, None]


@pytest.mark.parametrize("value", ["3", True, -3, 1.5, 10**400, None])
def test_values_that_are_no_number_of_leases(value: object) -> None:
    assert whole(value) is None


class Seeds(SeedClient):
    """Keeps the addresses that were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[SeedAddress] = []

    async def facts(self, address: SeedAddress, seed_key: str) -> dict[str, str]:
        self.asked.append(address)
        return {"vllm": "1"}


def test_an_address_that_is_listed_many_times_is_asked_once() -> None:
    names = ["127.0.0.1:5:0", "127.0.0.1:5:0", "127.0.0.1:5:1", "127.0.0.1:6:0"]
    entries = [{"seed": name, "fingerprint": f"f{number}"} for number, name in enumerate(names)]
    seeds = Seeds()
    compared = asyncio.run(compare(Worker("k", "own", {"vllm": "2"}), entries, seeds))
    assert seeds.asked == [SeedAddress("127.0.0.1", 5, 0), SeedAddress("127.0.0.1", 6, 0)]
    assert {each.text for each in compared} == {"vllm: 2 here, 1 there"}


@pytest.mark.parametrize("seed", ["", ":::", "\ud800:1:0", "a b:1:0", "h" * 5000 + ":1:0", "[:1:0", "h:99999999:0"])
def test_a_seed_with_an_unusable_name_is_a_line_of_the_comparison(seed: str) -> None:
    entries: list[dict[str, Any]] = [{"seed": seed, "fingerprint": "f"}]
    worker = Worker("k", "own", {"vllm": "2"})
    (compared,) = asyncio.run(compare(worker, entries, SeedClient(request_timeout_s=2.0)))
    assert compared.text.startswith("facts not readable: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["drain", "a:1:0", "--key", "k", "--within", "nan"],
        ["seeds", "--watch", "nan"],
        ["leases", "--timeout", "nan"],
        ["selftest", "--timeout", "nan"],
    ],
)
def test_nan_is_no_number_of_seconds(arguments: list[str]) -> None:
    with pytest.raises(click.BadParameter, match="'nan' is not a number of seconds"):
        main.main(arguments, standalone_mode=False)
    assert Seconds(0, 10).convert("2.5", None, None) == 2.5
