"""The collective engine keeps the port's contract over TCP, and over NCCL on a host stand-in for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from tests.standin import build
from vllm_rfork.testing import EngineContract


class TestTcp(EngineContract):
    engine: ClassVar[str] = "collective"
    preload: ClassVar[tuple[str, ...]] = ("vllm_rfork.engines.collective.engine", "vllm_rfork.engines.collective.tcp")


class TestNccl(EngineContract):
    engine: ClassVar[str] = "collective"
    device: ClassVar[str] = "cuda:0"
    buffer: ClassVar[str] = "tests.contracts.driver_buffer:DriverBuffer"
    preload: ClassVar[tuple[str, ...]] = (
        "torch",
        "vllm_rfork.engines.collective.engine",
        "vllm_rfork.engines.collective.nccl",
    )

    def environment(self) -> Mapping[str, str]:
        return build.cuda_environment(build.build(), apart=1)  # NCCL refuses two members on one GPU
