"""A whole engine: the tokens of a fork, and a seed that withdraws before its bytes change or its process is gone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import LineProcess, Planner, eventually, extra_for

pytestmark = pytest.mark.vllm


class Engine(LineProcess):
    """``llm_main`` in a process of its own."""

    def __init__(self, model: Path, load_format: str, extra: dict[str, Any]) -> None:
        arguments = {"model": str(model), "load_format": load_format, "extra": extra}
        super().__init__("tests.vllm.llm_main", json.dumps(arguments), marker="LLM ")

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


def test_a_seed_withdraws_before_its_weights_change(planner: Planner, model_a: Path, engines: list[Engine]) -> None:
    """The real worker of a real engine; ``test_workers.py`` has the other methods on workers of its own."""
    engines.append(engine := Engine(model_a, "rfork", options(planner, "reloading")))
    assert engine.wait()["seeds"], engine.log
    eventually(lambda: announced(planner, engine), "the seed is announced")
    engine.call("reload_weights")
    assert not announced(planner, engine), "withdrawn before the method returned"
    assert "withdraws: weights are reloaded" in engine.log


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_worker_is_withdrawn_idle_and_busy(
    how: signal.Signals, busy: bool, planner: Planner, model_a: Path, engines: list[Engine]
) -> None:
    engines.append(engine := Engine(model_a, "rfork", options(planner, f"killed-{how}-{busy}")))
    assert engine.wait()["seeds"], engine.log
    eventually(lambda: announced(planner, engine), "the seed is announced")
    if busy:
        engine.order("generate for ever")
    assert engine.process.poll() is None
    engine.process.send_signal(how)
    engine.process.wait(30)
    # Far below the 60 s after which the planner would drop it; a second is what the watcher takes when idle.
    eventually(lambda: not announced(planner, engine), "the seed is withdrawn", timeout_s=10)
