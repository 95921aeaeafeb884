"""``vllm-rfork explain`` with a planner and seed services: which fact differs, and what follows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.flow.memory_seed import KEY, NBYTES, manifest_of
from vllm_rfork.cli import pairing, predicted
from vllm_rfork.cli.main import main
from vllm_rfork.clients import PlannerClient
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.messages import SeedAddress
from vllm_rfork.planner.app import PlannerProcess
from vllm_rfork.planner.http.auth import Tokens
from vllm_rfork.planner.settings import settings_from
from vllm_rfork.seed_service import SeedService
from vllm_rfork.selftest.buffers import Buffer

FACTS = {"options.model.dtype": "bfloat16", "vllm": "0.26.0", "torch": "2.9"}
OTHER = {**FACTS, "options.model.dtype": "float16", "vllm": "0.25.1"}
#: Nothing listens there.
GONE = SeedAddress("127.0.0.1", 1, 0)


@contextlib.asynccontextmanager
async def seed(facts: Mapping[str, str], fingerprint: str, epoch: str) -> AsyncIterator[SeedAddress]:
    manifest = manifest_of(Buffer("cpu", NBYTES))
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    made = Manifest(**{**fields, "fingerprint": fingerprint, "epoch": epoch, "endpoint": "nowhere"})
    service = SeedService(made, bind_host="127.0.0.1", facts=facts)
    try:
        yield SeedAddress("127.0.0.1", await service.start(), 0)
    finally:
        await service.stop()


class Fleet:
    """A planner, the worker ``own``, a seed like it, and a seed with other facts, on a thread of their own."""

    url: str
    own: SeedAddress
    like: SeedAddress
    other: SeedAddress

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stack = contextlib.AsyncExitStack()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def __enter__(self) -> Fleet:
        self._thread.start()
        self.run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    async def _start(self) -> None:
        process = PlannerProcess(settings_from({"port": 0}), tokens=Tokens(None, {}))
        await self._stack.enter_async_context(process.running())
        self.url = process.url
        self.own = await self._stack.enter_async_context(seed(FACTS, "f1", "e1"))
        self.like = await self._stack.enter_async_context(seed(FACTS, "f1", "e2"))
        self.other = await self._stack.enter_async_context(seed(OTHER, "f2", "e3"))

    def announce(self, address: SeedAddress, fingerprint: str, epoch: str = "") -> None:
        self.run(PlannerClient(self.url).announce(KEY, address, fingerprint=fingerprint, slots=4, epoch=epoch))

    def withdraw(self, *addresses: SeedAddress) -> None:
        for address in addresses:
            self.run(PlannerClient(self.url).withdraw(KEY, address))


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    with Fleet() as fleet:
        yield fleet


@pytest.fixture
def fleet(running: Fleet) -> Iterator[Fleet]:
    """The fleet, with no seed announced."""
    yield running
    running.withdraw(running.own, running.like, running.other, GONE)


def explain(*arguments: str) -> Result:
    env = dict.fromkeys(("RFORK_SCHEDULER_URL", "MODEL_URL", "MODEL_DEPLOY_STRATEGY_NAME", "RFORK_TOKEN"))
    return CliRunner().invoke(main, ["explain", "--timeout", "10", *arguments], env=env)


NAMED = ("--model-url", "/models/q", "--strategy", "prod")


def test_explain_names_the_fact_that_differs(fleet: Fleet) -> None:
    fleet.announce(fleet.like, "f1")
    fleet.announce(fleet.other, "f2")
    fleet.announce(GONE, "f3")
    done = explain("--url", fleet.url, *NAMED, "--worker", f"127.0.0.1:{fleet.own.port}")
    assert done.exit_code == 0, done.output
    lines = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert lines["key"] == KEY
    assert lines["fingerprint"] == f"f1  (facts of 127.0.0.1:{fleet.own.port})"
    assert lines["seeds"] == "3 with this key: 1 pairs, 2 do not"
    assert lines[str(fleet.like)] == "pairs\tserving, 0 of 4 leases"
    expected = "differs\tdtype: bfloat16 here, float16 there; vllm: 0.26.0 here, 0.25.1 there"
    assert lines[str(fleet.other)] == expected
    assert lines[str(GONE)].startswith("differs\tfacts not readable: ")
    assert lines["answer"] == f"it would fork from {fleet.like}"


def test_a_worker_does_not_pair_with_itself(fleet: Fleet) -> None:
    """Its own seed is recognized by its epoch: the worker has several names."""
    fleet.announce(fleet.own, "f1", "e1")
    fleet.announce(fleet.other, "f2")
    done = explain("--url", fleet.url, *NAMED, "--worker", f"localhost:{fleet.own.port}")
    assert done.exit_code == 1
    assert f"{fleet.own}\titself\t" in done.stdout
    assert "answer\tit would load from storage (fingerprint)" in done.stdout.splitlines()


def test_a_seed_that_drains_pairs_but_is_not_granted(fleet: Fleet) -> None:
    fleet.announce(fleet.like, "f1")
    client = PlannerClient(fleet.url)
    lease = fleet.run(client.acquire(KEY, fingerprint="f1"))
    fleet.withdraw(fleet.like)
    done = explain("--url", fleet.url, *NAMED, "--worker", f"127.0.0.1:{fleet.own.port}")
    fleet.run(client.release(lease))
    assert done.exit_code == 1
    assert f"{fleet.like} pairs, but is draining, 1 of 4 leases" in done.stdout


def test_a_description_of_a_worker_can_be_saved_and_compared_elsewhere(fleet: Fleet, tmp_path: Path) -> None:
    fleet.announce(fleet.own, "f1", "e1")
    fleet.announce(fleet.other, "f2")
    saved = explain(*NAMED, "--worker", f"127.0.0.1:{fleet.own.port}", "--json")
    assert saved.exit_code == 0, saved.output
    file = tmp_path / "worker.json"
    file.write_text(saved.stdout)
    done = explain("--url", fleet.url, "--facts", str(file), "--json")
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert (found["key"], found["fingerprint"], found["facts"]) == (KEY, "f1", FACTS)
    assert found["answer"] == {"pairs": False, "text": "it would load from storage (fingerprint)"}
    results = {each["seed"]: each for each in found["seeds"]}
    assert results[str(fleet.own)]["result"] == "itself", "the file has the epoch of the worker's own seed"
    assert results[str(fleet.other)]["differences"] == [
        {"fact": "dtype", "here": "bfloat16", "there": "float16"},
        {"fact": "vllm", "here": "0.26.0", "there": "0.25.1"},
    ]


def test_without_a_fingerprint_nothing_is_certain(fleet: Fleet, tmp_path: Path) -> None:
    fleet.announce(fleet.like, "f1")
    fleet.announce(fleet.other, "f2")
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(FACTS))
    done = explain("--url", fleet.url, *NAMED, "--facts", str(file))
    assert done.exit_code == 2
    assert f"its facts are equal to those of {fleet.like}, but the worker's fingerprint is not known" in done.stdout
    assert explain("--url", fleet.url, *NAMED).exit_code == 2


def test_a_key_that_no_seed_has_names_those_that_resemble_it(fleet: Fleet) -> None:
    fleet.announce(fleet.like, "f1")
    done = explain("--url", fleet.url, "--model-url", "/models/q", "--strategy", "prd")
    assert done.exit_code == 1
    assert f"near key\t{KEY}" in done.stdout.splitlines()
    assert "(none: no other seed has this key)" in done.stdout


def test_of_many_seeds_one_of_each_fingerprint_is_asked_first(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MAX_READ", 2)
    entries = [{"seed": str(GONE), "fingerprint": "f3"}] * 5 + [{"seed": str(fleet.other), "fingerprint": "f2"}]
    worker = pairing.Worker(KEY, "f1", FACTS)
    assert pairing._to_read(worker, entries) == [str(GONE), str(fleet.other)]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--url", "http://127.0.0.1:1"],
        [*NAMED],
        [*NAMED, "--url", "http://127.0.0.1:1", "--worker", "a:1", "--facts", "f"],
        [*NAMED, "--url", "http://127.0.0.1:1", "--worker", "nowhere"],
        [*NAMED, "--url", "http://127.0.0.1:1", "--facts", "/no/such/file"],
        [*NAMED, "--url", "http://127.0.0.1:1"],
        [*NAMED, "--url", "http://127.0.0.1:1", "--worker", "127.0.0.1:1"],
    ],
)
def test_wrong_usage_and_peers_that_do_not_answer_are_not_an_answer(wrong: list[str]) -> None:
    """1 means that the worker does not pair."""
    done = explain(*wrong)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)


PREDICTED = {"key": KEY, "fingerprint": "f1", "facts": FACTS}


def predicting(monkeypatch: pytest.MonkeyPatch, program: str, tmp_path: Path) -> None:
    """Run ``program`` in place of vLLM."""
    (tmp_path / "as_if_vllm.py").write_text(f"import json, os, sys\n{program}")
    monkeypatch.setattr(predicted, "_MODULE", "as_if_vllm")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_worker_that_would_be_started_is_compared(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.announce(fleet.other, "f2")
    found = {**PREDICTED, "planner": fleet.url}
    predicting(monkeypatch, f"print('a log line of', sys.argv)\nprint(json.dumps({found!r}))", tmp_path)
    done = explain("--", "/models/q", "--dtype", "bfloat16")
    assert done.exit_code == 1, done.output
    assert "fingerprint\tf1  (facts of vllm serve /models/q)" in done.stdout.splitlines()
    assert "dtype: bfloat16 here, float16 there" in done.stdout


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("print('log')\nprint('--load-format: is auto')\nsys.exit(3)", "Error: --load-format: is auto\n"),
        ("sys.exit('vllm serve: error: unrecognized arguments')", "unrecognized arguments"),
        ("print('log')", "made no configuration"),
        ("import time\ntime.sleep(60)", "no configuration within 1 s"),
    ],
)
def test_arguments_without_a_configuration_are_not_an_answer(
    program: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicting(monkeypatch, program, tmp_path)
    monkeypatch.setattr(predicted, "BOUND_S", 1.0 if "sleep" in program else 60.0)
    done = explain("--", "/models/q")
    assert done.exit_code == 2
    assert text in done.stderr


def test_without_vllm_nothing_can_be_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicted, "is_worker_host", lambda: False)
    done = explain("--", "/models/q")
    assert (done.exit_code, "vLLM is not installed" in done.stderr) == (2, True)
