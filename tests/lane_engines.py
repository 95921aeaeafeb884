"""Engines whose calls are recorded and scripted: alpha, beta, and gamma, which opens quickly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from vllm_rfork.engines.base import EngineConfig
from vllm_rfork.engines.memory import MemoryEngine
from vllm_rfork.engines.registry import ENGINES, EngineRow
from vllm_rfork.manifest.schema import Region
from vllm_rfork.manifest.segments import Segment

#: What was called, as ``alpha connect``.
CALLS: list[str] = []
#: The leases that were presented.
LEASES: list[str] = []


class Recorded(MemoryEngine):
    """The memory engine. ``script``: what a call does first; ``obstacle``: what ``lane_obstacle`` finds."""

    opens_quickly: ClassVar[bool] = False
    obstacle: ClassVar[str | None] = None
    script: ClassVar[dict[str, Callable[[], None]]] = {}

    @classmethod
    def lane_obstacle(cls, endpoint: str, config: EngineConfig) -> str | None:
        cls._called("obstacle")
        return cls.obstacle

    def open(self, config: EngineConfig) -> None:
        self._called("open")
        super().open(config)

    def register(self, regions: Sequence[Region]) -> None:
        self._called("register")
        super().register(regions)

    def present_lease(self, lease: str) -> None:
        LEASES.append(lease)

    def connect(self, endpoint: str, timeout_s: float) -> None:
        self._called("connect")
        super().connect(endpoint, timeout_s)

    def lane(self, endpoint: str) -> str:
        return f"{self.name}/straight"

    def read(self, endpoint: str, segments: Sequence[Segment], timeout_s: float) -> None:
        self._called("read")
        super().read(endpoint, segments, timeout_s)

    def close(self) -> None:
        self._called("close")
        super().close()

    @classmethod
    def _called(cls, call: str) -> None:
        CALLS.append(f"{cls.name} {call}")
        cls.script.get(call, lambda: None)()


class Alpha(Recorded):
    name: ClassVar[str] = "alpha"


class Beta(Recorded):
    name: ClassVar[str] = "beta"


class Gamma(Recorded):
    name: ClassVar[str] = "gamma"
    opens_quickly: ClassVar[bool] = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The three are engines of this package meanwhile; the calls that they get."""
    for engine in (Alpha, Beta, Gamma):
        monkeypatch.setattr(engine, "script", {})
        monkeypatch.setattr(engine, "obstacle", None)
        monkeypatch.setitem(ENGINES, engine.name, EngineRow(__name__, engine.__name__, "it is a test's"))
    CALLS.clear()
    LEASES.clear()
    return CALLS


def raises(error: BaseException) -> Callable[[], None]:
    def call() -> Any:
        raise error

    return call
