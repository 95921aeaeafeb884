"""``vllm-rfork drain``, ``lift`` and ``seeds --watch`` against a planner process as users start it."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result

from tests.planner.processes import PlannerUnderTest
from vllm_rfork.cli import operate, tables
from vllm_rfork.cli.main import main
from vllm_rfork.cli.watch import watch
from vllm_rfork.clients import Outcome, PlannerClient
from vllm_rfork.messages import Lease, SeedAddress

TOKEN = "a-token-that-no-output-may-hold"
KEY = "/models/q$prod$kv_both$0$0"
SEED = SeedAddress("127.0.0.1", 5000, 0)
#: A drain lasts as long as the epoch, so each test has its own.
EPOCHS = map(str, itertools.count(1))


@pytest.fixture(scope="module")
def planner() -> Iterator[PlannerUnderTest]:
    process = PlannerUnderTest("--failures-before-backoff", "1", RFORK_TOKEN=TOKEN).until_ready()
    try:
        yield process
    finally:
        process.kill()


def client(planner: PlannerUnderTest) -> PlannerClient:
    return PlannerClient(planner.url, token=TOKEN)


@pytest.fixture
def lease(planner: PlannerUnderTest) -> Iterator[Lease]:
    """The lease of a receiver that reads from ``SEED``."""

    async def acquire() -> Lease:
        await client(planner).announce(KEY, SEED, epoch=next(EPOCHS), slots=4)
        return await client(planner).acquire(KEY)

    lease = asyncio.run(acquire())
    yield lease
    asyncio.run(client(planner).withdraw(KEY, SEED))


def run(*arguments: str, token: str | None = TOKEN) -> Result:
    return CliRunner().invoke(main, list(arguments), env={"RFORK_TOKEN": token, "RFORK_SCHEDULER_URL": None})


def order(
    planner: PlannerUnderTest, command: str, *flags: str, seed: object = SEED, token: str | None = TOKEN
) -> Result:
    return run(command, str(seed), "--key", KEY, "--url", planner.url, *flags, token=token)


def state(planner: PlannerUnderTest) -> str:
    rows = run("seeds", "--url", planner.url).stdout.splitlines()
    header, row = (line.split("\t") for line in rows)
    return row[header.index("state")]


def test_a_drain_and_its_end(planner: PlannerUnderTest, lease: Lease) -> None:
    done = order(planner, "drain")
    assert (done.exit_code, done.stdout) == (0, f"seed {SEED} is draining, 1 lease left\n")
    assert state(planner) == "draining"
    done = order(planner, "drain", "--undo")
    assert (done.exit_code, done.stdout) == (0, f"seed {SEED} is not draining any more, 1 lease left\n")
    assert state(planner) == "serving"
    asyncio.run(client(planner).release(lease))


@pytest.mark.parametrize("seed", ["x", "127.0.0.1:5000", "127.0.0.1:port:0"])
def test_what_is_not_a_seed_is_refused_with_the_form_of_one(seed: str) -> None:
    done = run("drain", seed, "--key", KEY)
    assert done.exit_code == 2
    assert "expected ip:port:rank, as `vllm-rfork seeds` prints it" in " ".join(done.stderr.split())


def test_a_drain_waits_for_the_last_lease(
    planner: PlannerUnderTest, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate, "_POLL_S", 0.05)
    done = order(planner, "drain", "--wait", "--within", "0")
    assert done.exit_code == 1
    assert "still has 1 leases after 0 s" in done.stderr
    threading.Timer(0.3, lambda: asyncio.run(client(planner).release(lease))).start()
    done = order(planner, "drain", "--wait", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"seed": str(SEED), "draining": True, "leases": 0}


def test_a_wait_ends_if_the_drain_is_undone(
    planner: PlannerUnderTest, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate.time, "sleep", lambda seconds: order(planner, "drain", "--undo"))
    done = order(planner, "drain", "--wait", "--within", "60")
    assert done.exit_code == 1
    assert "the drain was undone" in done.stderr
    asyncio.run(client(planner).release(lease))


def test_a_quarantine_is_lifted_once(planner: PlannerUnderTest, lease: Lease) -> None:
    failed = client(planner).release(lease, result="failed", cause="VerificationError", side="seed")
    assert asyncio.run(failed) is Outcome.DONE
    assert state(planner).startswith("quarantined")
    assert order(planner, "lift").stdout == f"seed {SEED} is not quarantined any more\n"
    assert state(planner) == "serving"
    done = order(planner, "lift")
    assert (done.exit_code, done.stdout) == (0, f"seed {SEED} was not quarantined\n")
    assert json.loads(order(planner, "lift", "--json").stdout) == {"seed": str(SEED), "was_quarantined": False}


@pytest.mark.parametrize("command", ["drain", "lift"])
def test_orders_that_the_planner_refuses(planner: PlannerUnderTest, command: str) -> None:
    done = order(planner, command, seed=SeedAddress("127.0.0.1", 5999, 0))
    assert done.exit_code == 1
    assert "404" in done.stderr
    done = order(planner, command, token="wrong-token-that-no-output-may-hold")
    assert done.exit_code == 1
    assert "RFORK_TOKEN" in done.stderr
    assert "no-output-may-hold" not in done.output
    assert order(planner, command, seed="10.0.0.7").exit_code == 2


def test_watching_redraws_and_outlives_a_planner_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[object] = ["one", click.ClickException("no answer"), "three"]
    pauses: list[float] = []

    def fetch() -> object:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if not answers:
            raise KeyboardInterrupt

    watch(fetch, print, 2.0, sleep=sleep)
    out, err = capsys.readouterr()
    assert out == "one\n\n\nthree\n\n"
    assert err == "Error: no answer\n"
    assert pauses == [2.0] * 3
    answers.append("four")
    cleared: list[None] = []
    monkeypatch.setattr(tables, "on_terminal", lambda: True)
    monkeypatch.setattr("vllm_rfork.cli.watch.on_terminal", lambda: True)
    monkeypatch.setattr(click, "clear", lambda: cleared.append(None))
    watch(fetch, print, 2.0, sleep=sleep)
    assert "every 2 s; Ctrl-C ends\nfour\n" in capsys.readouterr().out
    assert cleared == [None]


def test_watch_takes_a_number_or_none(planner: PlannerUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def once(fetch: object, show: object, every_s: float) -> None:
        given.append(every_s)

    monkeypatch.setattr("vllm_rfork.cli.fleet.watch", once)
    assert run("seeds", "--watch", "--url", planner.url).exit_code == 0
    assert run("seeds", "--url", planner.url, "--watch", "7").exit_code == 0
    assert given == [2.0, 7.0]
