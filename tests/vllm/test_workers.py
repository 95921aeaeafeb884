"""Every worker method that changes weights withdraws the seed first, on whatever worker class there is."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_rfork.vllm_compat.workers import CHANGES_WEIGHTS, withdraw_before_changes

pytestmark = pytest.mark.vllm

_calls: list[str] = []


@pytest.fixture
def worker_class() -> Any:
    from vllm.v1.worker.worker_base import WorkerBase

    def method(name: str) -> Any:
        def called(self: Any, *args: Any, **kwargs: Any) -> str:
            _calls.append(name)
            return f"{name} returned {args} {kwargs}"

        return called

    return type("PlatformWorker", (WorkerBase,), {name: method(name) for name in (*CHANGES_WEIGHTS, "execute_model")})


@pytest.mark.parametrize("name", sorted(CHANGES_WEIGHTS))
def test_the_seed_is_withdrawn_before_the_method_runs(name: str, worker_class: Any) -> None:
    _calls.clear()
    withdraw_before_changes(lambda reason: _calls.append(f"withdrawn: {reason}"))
    withdraw_before_changes(lambda reason: _calls.append("a second time"))
    worker = object.__new__(worker_class)
    assert getattr(worker, name)(1, a=2) == f"{name} returned (1,) {{'a': 2}}"
    assert _calls == [f"withdrawn: {CHANGES_WEIGHTS[name]}", name]


def test_serving_is_left_alone(worker_class: Any) -> None:
    _calls.clear()
    withdraw_before_changes(_calls.append)
    object.__new__(worker_class).execute_model()
    assert _calls == ["execute_model"]


def test_the_methods_exist_on_vllms_own_workers() -> None:
    """A method that vLLM renames would silently stop to withdraw."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    found = {name for name in CHANGES_WEIGHTS if hasattr(CPUWorker, name)}
    assert set(CHANGES_WEIGHTS) - found == {"reinitialize_distributed"}  # before 0.20
    wrapped = withdraw_before_changes(lambda reason: None)
    assert {"CPUWorker.sleep", "Worker.reload_weights", "Worker.shutdown"} <= set(wrapped)
