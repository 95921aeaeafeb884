"""NIXL keeps the port's contract on the lane that it chooses on one machine."""

from __future__ import annotations

from typing import ClassVar

from tests.contracts.engine_suite import EngineContract


class TestNixlEngine(EngineContract):
    engine: ClassVar[str] = "nixl"
