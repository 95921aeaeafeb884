"""The engines by name: adapters, install hints, default devices. An adapter is imported when it is first used.

The engines of this package are rows of :data:`ENGINES`. Another distribution adds one by an entry point in the group
``vllm_rfork.engines``: its name is the engine's name, its object a subclass of
:class:`~vllm_rfork.engines.base.TransferEngine`. It cannot replace an engine of this package.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from vllm_rfork.engines.base import TransferEngine
from vllm_rfork.errors import ConfigError, EngineUnavailable
from vllm_rfork.logs.worker import worker_logger

logger = worker_logger(__name__)

GROUP = "vllm_rfork.engines"


@dataclass(frozen=True)
class EngineRow:
    """An engine of this package.

    Attributes:
        module, cls: the adapter.
        hint: how to install what it needs.
        packages: the distributions that it needs, in every variant; for their versions.
        host_hint: how to select the network interface, for an engine that ignores ``EngineConfig.host``.
    """

    module: str
    cls: str
    hint: str
    packages: tuple[str, ...] = ()
    host_hint: str | None = None


ENGINES: dict[str, EngineRow] = {
    "yuanrong": EngineRow(
        "vllm_rfork.engines.yuanrong.engine",
        "YuanRongEngine",
        "install it with: pip install 'vllm-rfork[ascend]'",
        packages=("openyuanrong-transfer-engine", "openyuanrong-datasystem"),
    ),
    "nixl": EngineRow(
        "vllm_rfork.engines.nixl.engine",
        "NixlEngine",
        "install it with: pip install 'vllm-rfork[nixl]'",
        packages=("nixl-cu13", "nixl-cu12", "nixl"),
        host_hint="UCX listens on every interface; set UCX_NET_DEVICES to choose",
    ),
    "cuda_ipc": EngineRow(
        "vllm_rfork.engines.cuda_ipc.engine",
        "CudaIpcEngine",
        "install the NVIDIA driver; in a container, the NVIDIA container toolkit mounts it",
        host_hint="it uses no network",
    ),
    "mooncake": EngineRow(
        "vllm_rfork.engines.mooncake.engine",
        "MooncakeEngine",
        "install one of its wheels: pip install 'vllm-rfork[mooncake-cuda13]', or [mooncake-cuda12], [mooncake-npu], "
        "[mooncake-cpu]",
        packages=(
            "mooncake-transfer-engine",
            "mooncake-transfer-engine-cuda13",
            "mooncake-transfer-engine-non-cuda",
            "mooncake-transfer-engine-npu",
            "mooncake-transfer-engine-rocm",
            "mooncake-transfer-engine-musa",
            "mooncake-transfer-engine-efa",
            "mooncake-transfer-engine-efa-cuda13",
            "mooncake-transfer-engine-efa-non-cuda",
        ),
    ),
    "collective": EngineRow(
        "vllm_rfork.engines.collective.engine",
        "CollectiveEngine",
        "on a GPU it needs libnccl.so.2, which torch's wheels bring; on an NPU torch_npu; on a CPU nothing",
        packages=("torch", "torch-npu"),
    ),
    "memory": EngineRow(
        "vllm_rfork.engines.memory",
        "MemoryEngine",
        "it is part of vllm-rfork, for tests and demos",
        host_hint="it uses no network",
    ),
}

#: The engine whose endpoint a seed writes where older receivers look for the only one, by torch device type. It also
#: stands for all engines in the fingerprint, so that neither engines nor their order separate workers.
DEFAULT_ENGINE: dict[str, str] = {"npu": "yuanrong", "cuda": "nixl", "cpu": "nixl"}

#: The engines of ``rfork_engine=auto`` in the order in which a receiver tries them, by torch device type. Mooncake is
#: not among them: a caller that reaches its ports can write to a seed's weights, so users must have named it.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda_ipc", "nixl", "collective"),
    "cpu": ("nixl", "collective"),
    "npu": ("yuanrong", "collective"),
}
AUTO = "auto"


def engine_names() -> list[str]:
    """The names of all engines, those of other distributions last."""
    try:
        others = {entry.name for entry in entry_points(group=GROUP)}
    except Exception as error:  # noqa: BLE001 - any distribution with a malformed entry_points.txt fails the search
        logger.warning("The engines of other distributions cannot be listed: %s: %s", type(error).__name__, error)
        others = set()
    return [*ENGINES, *sorted(others - set(ENGINES))]


def install_hint(name: str) -> str:
    """The install hint of one of this package's engines."""
    return ENGINES[name].hint


def engine_class(name: str) -> type[TransferEngine]:
    """The adapter class called ``name``. Importing it does not import the engine's native package.

    Raises:
        ConfigError: no engine has that name, or two distributions have one.
        EngineUnavailable: another distribution's engine cannot be imported, or is not an engine of that name.
    """
    if (row := ENGINES.get(name)) is not None:
        cls: type[TransferEngine] = getattr(importlib.import_module(row.module), row.cls)
        return cls
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise ConfigError("rfork_engine", f"there is no engine {name!r}", "auto, " + ", ".join(engine_names()))
    if len(found) > 1:
        owners = ", ".join(sorted(_owner(entry) for entry in found))
        raise ConfigError("rfork_engine", f"engine {name!r} is in several distributions ({owners})", "any other engine")
    return _load(found[0])


def _load(entry: EntryPoint) -> type[TransferEngine]:
    owner = _owner(entry)
    try:
        loaded = entry.load()
    except Exception as error:
        text = f"{entry.value} of {owner} cannot be imported: {type(error).__name__}: {error}"
        raise EngineUnavailable(entry.name, text, hint=f"install a working {owner}") from error
    problem = None
    if not (isinstance(loaded, type) and issubclass(loaded, TransferEngine)):
        problem = "is not a subclass of TransferEngine"
    elif missing := sorted(loaded.__abstractmethods__):
        problem = f"lacks {', '.join(missing)}"
    elif loaded.name != entry.name:
        problem = f"is called {loaded.name!r}, not {entry.name!r}"
    if problem is not None:
        text = f"{entry.value} of {owner} {problem}"
        raise EngineUnavailable(entry.name, text, hint=f"report it to the authors of {owner}")
    engine: type[TransferEngine] = loaded
    return engine


def _owner(entry: EntryPoint) -> str:
    """The distribution of an entry point, with its version."""
    dist = entry.dist
    return "an unknown distribution" if dist is None else f"{dist.name} {dist.version}"


def engine_order(setting: str, device_type: str) -> tuple[str, ...]:
    """The engines that ``rfork_engine=setting`` selects for a torch device type, the preferred one first.

    Args:
        setting: :data:`AUTO`, or names with commas between and no spaces.

    Raises:
        ConfigError: there is no such engine, or it cannot use that device's memory.
    """
    if setting == AUTO:
        if device_type not in AUTO_ORDER:
            problem = f"auto selects no engine for device type {device_type!r}"
            raise ConfigError("rfork_engine", problem, "one of " + ", ".join(engine_names()))
        return tuple(name for name in AUTO_ORDER[device_type] if name in ENGINES)
    for name, cls in _listed(setting).items():
        if cls is not None and device_type not in cls.device_types:
            types = ", ".join(sorted(cls.device_types))
            problem = f"engine {name} has no access to {device_type} memory, only to {types}"
            raise ConfigError("rfork_engine", problem, "auto, or engines for this device")
    return tuple(_listed(setting))


def check_engines(setting: str) -> None:
    """Raise :class:`ConfigError` if ``rfork_engine=setting`` names an engine that does not exist."""
    if setting != AUTO:
        _listed(setting)


def _listed(setting: str) -> dict[str, type[TransferEngine] | None]:
    """The classes of the engines in a list; None for one that cannot be imported: opening it reports why."""
    found: dict[str, type[TransferEngine] | None] = {}
    for name in setting.split(","):
        found[name] = None
        with contextlib.suppress(EngineUnavailable):
            found[name] = engine_class(name)
    return found
