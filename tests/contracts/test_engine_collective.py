"""The collective engine keeps the port's contract over gloo."""

from __future__ import annotations

from typing import ClassVar

from vllm_rfork.testing import EngineContract


class TestCollectiveEngine(EngineContract):
    engine: ClassVar[str] = "collective"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.collective.gloo",)
