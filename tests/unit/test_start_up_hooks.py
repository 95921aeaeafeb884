"""Hooks on a start: which are installed, and that none of them can fail it."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator

import pytest

from vllm_rfork.vllm_compat import start_up
from vllm_rfork.vllm_compat.start_up import Hook, install_hooks, warm_up
from vllm_rfork.vllm_compat.start_up.guard import guarded
from vllm_rfork.vllm_compat.start_up.listener import CacheListener, listen, listener


class Warm:
    """A listener that counts the ends of warm-ups."""

    def __init__(self) -> None:
        self.count = 0

    def warm(self) -> None:
        self.count += 1


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType("a_hook_of_a_test")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setattr(start_up, "HOOKS", (Hook("triton", "code", made.__name__), Hook("plan", "safe", "no.such")))
    return made


@pytest.fixture(autouse=True)
def nothing_listens() -> Iterator[None]:
    yield
    listen(None)


def test_a_hook_that_this_vllm_lacks_costs_one_line_and_not_the_start(
    module: types.ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def install() -> None:
        raise AttributeError("module 'triton' has no attribute 'cache'")

    module.install = install  # type: ignore[attr-defined]
    with caplog.at_level(logging.INFO):
        install_hooks("code")
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "triton is not supported with this vLLM" in caplog.messages[0]
    assert "plan is not supported with this vLLM" in caplog.messages[1]


def test_hooks_for_code_are_not_installed_at_level_safe(module: types.ModuleType) -> None:
    installed = []
    module.install = lambda: installed.append(1)  # type: ignore[attr-defined]
    install_hooks("safe")
    assert not installed
    install_hooks("code")
    assert installed


def test_the_outermost_frame_of_a_hook_names_what_failed(caplog: pytest.LogCaptureFixture) -> None:
    with guarded("torch_aot"):
        raise KeyError("rank")
    assert "torch_aot was left to vLLM because of KeyError: 'rank'" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


def test_the_end_of_warm_up_is_reported_after_the_workers_method(monkeypatch: pytest.MonkeyPatch) -> None:
    class WorkerBase:
        def compile_or_warm_up_model(self) -> float:
            assert counting.count == 0
            return 1.5

    class Worker(WorkerBase):
        pass

    base = types.ModuleType("worker_base")
    base.WorkerBase = WorkerBase  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", base)
    warm_up.install()
    warm_up.install()
    counting = Warm()
    listen(counting)  # type: ignore[arg-type]
    assert Worker().compile_or_warm_up_model() == 1.5
    assert counting.count == 1


def test_without_a_listener_nothing_is_carried() -> None:
    nothing: CacheListener = listener()
    assert nothing.agree("plan", None) == "this process carries no caches"
    nothing.warm()
