"""Which engine a name means, and how to install it: imported on first use, never before."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.errors import ConfigError


@dataclass(frozen=True)
class EngineRow:
    """One engine.

    Attributes:
        module, cls: the adapter's.
        hint: the command that installs what it needs.
        host_hint: how to choose the network interface, for an engine that does not listen on ``EngineConfig.host``;
            empty for one that does.
    """

    module: str
    cls: str
    hint: str
    host_hint: str = ""


ENGINES: dict[str, EngineRow] = {
    "yuanrong": EngineRow(
        "vllm_rfork.engines.yuanrong.engine", "YuanRongEngine", "install it with: pip install 'vllm-rfork[ascend]'"
    ),
    "nixl": EngineRow(
        "vllm_rfork.engines.nixl.engine",
        "NixlEngine",
        "install it with: pip install 'vllm-rfork[nixl]'",
        host_hint="UCX listens on every interface; set UCX_NET_DEVICES to choose",
    ),
    "cuda_ipc": EngineRow(
        "vllm_rfork.engines.cuda_ipc.engine",
        "CudaIpcEngine",
        "it needs the NVIDIA driver alone, no package",
        host_hint="it uses no network",
    ),
    "memory": EngineRow(
        "vllm_rfork.engines.memory",
        "MemoryEngine",
        "it is part of vllm-rfork, for tests and demos",
        host_hint="it uses no network",
    ),
}

#: ``rfork_engine=auto``: by torch device type.
DEFAULT_ENGINE: dict[str, str] = {"npu": "yuanrong", "cuda": "nixl", "cpu": "nixl"}


def engine_class(name: str) -> type[TransferEngine]:
    """The adapter class called ``name``; importing it does not import the engine's native package.

    Raises:
        ConfigError: there is no engine of that name.
    """
    row = ENGINES.get(name)
    if row is None:
        raise ConfigError("rfork_engine", f"there is no engine {name!r}", "auto, " + ", ".join(ENGINES))
    cls: type[TransferEngine] = getattr(importlib.import_module(row.module), row.cls)
    return cls


def engine_for_device(device_type: str) -> str:
    """The engine that ``auto`` means on a torch device type.

    Raises:
        ConfigError: no engine is known for it.
    """
    if device_type not in DEFAULT_ENGINE:
        raise ConfigError(
            "rfork_engine", f"auto knows no engine for device type {device_type!r}", "one of " + ", ".join(ENGINES)
        )
    return DEFAULT_ENGINE[device_type]
