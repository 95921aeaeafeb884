"""Mooncake keeps the port's contract over TCP, unmodified, in an environment of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tests.contracts.driver_buffer import ROOT
from vllm_rfork.testing import EngineContract

PYTHON = ROOT / ".venv-mooncake" / "bin" / "python"


class TestMooncakeEngine(EngineContract):
    """Host memory over TCP, on any machine: RDMA is switched off."""

    engine: ClassVar[str] = "mooncake"

    def python(self) -> str:
        return str(PYTHON)

    def environment(self) -> Mapping[str, str]:
        # Mooncake's wait for a peer that sends nothing, 30 s by default; close waits for it.
        return {"MC_FORCE_TCP": "1", "MC_TCP_PROGRESS_TIMEOUT_SEC": "2", "GLOG_minloglevel": "2"}
