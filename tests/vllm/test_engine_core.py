"""A whole engine: the tokens of a fork, and a seed that withdraws before its bytes change or its process is gone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LineProcess, LogRecords, Planner, eventually, extra_for
from tests.vllm.engine_process import load_digested, vllm_config

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("vllm_imported")]


class Engine(LineProcess):
    """``llm_main`` in a process of its own."""

    def __init__(self, model: Path, load_format: str, extra: dict[str, Any]) -> None:
        arguments = {"model": str(model), "load_format": load_format, "extra": extra}
        super().__init__("tests.vllm.llm_main", json.dumps(arguments), forked=True)

    def call(self, *what: object) -> dict[str, Any]:
        return self.order("call " + json.dumps(what))


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    started: list[Engine] = []
    yield started
    for engine in started:
        engine.end()


def options(planner: Planner, name: str, **more: Any) -> dict[str, Any]:
    return extra_for(planner.url, model_url=name, rfork_engine="nixl", rfork_heartbeat_interval_sec=1.0, **more)


def announced(planner: Planner, engine: Engine) -> bool:
    return engine.first["seeds"][0] in planner.seeds()


@pytest.mark.timeout(900)  # several engines start one after the other; a busy machine takes minutes for each
def test_a_fork_answers_as_a_default_load_does_and_other_weights_do_not(
    planner: Planner, model_a: Path, model_b: Path, model_a_without_weights: Path, engines: list[Engine]
) -> None:
    default, other = Engine(model_a, "auto", {}), Engine(model_b, "auto", {})
    engines += [default, other]
    expected, different = default.order("answer")["answers"], other.order("answer")["answers"]
    default.end()
    other.end()
    engines.append(seed := Engine(model_a, "rfork", options(planner, "tokens")))
    assert seed.wait()["seeds"], seed.log
    eventually(lambda: announced(planner, seed), "the seed is announced")
    engines.append(fork := Engine(model_a_without_weights, "rfork", options(planner, "tokens")))
    assert fork.order("answer")["answers"] == expected
    assert f"from seed {seed.first['seeds'][0]}" in fork.log
    assert seed.order("answer")["answers"] == expected
    # The comparison can fail: answers differ from prompt to prompt and from weights to weights.
    assert different != expected
    assert len({json.dumps(answer[0]) for answer in expected}) == len(expected)


@pytest.mark.timeout(900)
def test_a_seed_withdraws_before_its_weights_change_and_comes_back_with_the_same(
    planner: Planner, model_a: Path, model_b: Path, engines: list[Engine], rfork_log: LogRecords
) -> None:
    """The real worker of a real engine; ``test_workers.py`` has the other methods on workers of its own."""
    engines.append(engine := Engine(model_a, "rfork", options(planner, "reloading")))
    assert engine.wait()["seeds"], engine.log
    eventually(lambda: announced(planner, engine), "the seed is announced")
    tokens = engine.order("answer")["answers"]

    assert engine.call("reload_weights")["outcome"] == "done", engine.log
    assert not announced(planner, engine), "withdrawn before the method returned"
    assert "withdraws: weights are reloaded" in engine.log
    (again,) = eventually(lambda: seeds_of(planner, "reloading"), "the seed is announced again")
    same: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4}  # as in ``llm_main``: part of the fingerprint
    extra = options(planner, "reloading", rfork_become_seed=False)
    forked = load_digested(vllm_config(model_a, load_format="rfork", extra=extra, **same))
    assert forked.before == load_digested(vllm_config(model_a, **same)).before
    assert any(f"from seed {again}" in line for line in rfork_log.texts())

    assert engine.call("reload_weights", None, str(model_b))["outcome"] == "done", engine.log
    assert engine.order("answer")["answers"] != tokens, "the test is about other weights"
    eventually(lambda: "not a seed again" in engine.log, "the log line")
    assert seeds_of(planner, "reloading") == []


@pytest.mark.timeout(900)
def test_a_function_that_writes_to_the_model_ends_the_seed(
    planner: Planner, model_a: Path, engines: list[Engine]
) -> None:
    """``llm.collective_rpc(lambda worker: ...)``: with ``rfork_verify`` off a receiver would take the change over."""
    engines.append(engine := Engine(model_a, "rfork", options(planner, "written")))
    assert engine.wait()["seeds"], engine.log
    eventually(lambda: announced(planner, engine), "the seed is announced")
    engine.order("write by a function")
    assert not announced(planner, engine), "withdrawn before the function ran"
    assert "withdraws: a function is called on the worker" in engine.log
    eventually(lambda: "not a seed again" in engine.log, "the log line")
    assert "model.norm.weight" in engine.log
    assert seeds_of(planner, "written") == []


def seeds_of(planner: Planner, name: str) -> list[str]:
    seeds = [seed for seed in planner.snapshot()["seeds"] if str(seed["key"]).startswith(f"{name}$")]
    return [f"{seed['ip']}:{seed['port']}:{seed['rank']}" for seed in seeds]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_worker_is_withdrawn_idle_and_busy(
    how: signal.Signals, busy: bool, fleet_planner: Planner, model_a: Path, engines: list[Engine]
) -> None:
    engines.append(engine := Engine(model_a, "rfork", options(fleet_planner, f"killed-{how}-{busy}")))
    assert engine.wait()["seeds"], engine.log
    eventually(lambda: announced(fleet_planner, engine), "the seed is announced")
    if busy:
        engine.order("generate for ever")
    assert engine.process.poll() is None
    engine.process.send_signal(how)
    engine.process.wait(120)
    # Far below the 60 s after which the planner would drop it; the broken connection is seen at once.
    eventually(lambda: not announced(fleet_planner, engine), "the seed is granted no more", timeout_s=30)
