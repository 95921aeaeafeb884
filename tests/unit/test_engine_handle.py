"""The end of a worker's engine: closed, or kept for ever together with the memory that it may still write to."""

from __future__ import annotations

from typing import Any, cast

import pytest

from vllm_rfork.errors import EngineError
from vllm_rfork.fork import engine_handle
from vllm_rfork.fork.engine_handle import close_or_quarantine


class Engine:
    name = "pigeon"

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def close(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.fixture
def quarantine(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    kept: list[Any] = []
    monkeypatch.setattr(engine_handle, "_quarantine", kept)
    return kept


@pytest.mark.parametrize("error", [EngineError("pigeon", "close", "it flies"), OSError("gone"), RuntimeError("native")])
def test_whatever_an_engine_raises_its_memory_stays(
    error: Exception, quarantine: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Engines of other distributions may raise anything, and their reads may still be under way."""
    engine, memory = Engine(error), object()
    close_or_quarantine(cast("Any", engine), memory)
    assert quarantine == [(engine, memory)]
    assert "its buffers stay allocated" in caplog.text
    assert "pigeon" in caplog.text


def test_without_registered_memory_there_is_nothing_to_keep(quarantine: list[Any]) -> None:
    close_or_quarantine(cast("Any", Engine(RuntimeError("native"))), None)
    close_or_quarantine(cast("Any", Engine(None)), object())
    assert quarantine == []
