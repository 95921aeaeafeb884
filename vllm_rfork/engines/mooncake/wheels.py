"""The distributions of Mooncake TransferEngine, which all bring one package ``mooncake`` and exclude each other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm_rfork.engines.registry import ENGINES

#: The extras of this package that serve a torch device type, and what each is for, the most common first.
_EXTRAS = {
    "cpu": {"mooncake-cpu": "host memory"},
    "cuda": {"mooncake-cuda13": "CUDA 13", "mooncake-cuda12": "CUDA 12", "mooncake-rocm": "AMD GPUs"},
    "npu": {"mooncake-npu": "Ascend NPUs"},
}
#: The file that the driver of a machine's devices makes, by torch device type.
_DRIVERS = {"cuda": Path("/dev/nvidiactl"), "npu": Path("/dev/davinci_manager")}


def installed() -> dict[str, str]:
    """The installed distributions and their versions; more than one overwrite each other's files."""
    found = {}
    for name in ENGINES["mooncake"].packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def with_efa() -> bool:
    """Return True if the installed distribution was built for AWS EFA."""
    return any("-efa" in name for name in installed())


def hint_for(device_type: str) -> str:
    """The advice to install the distribution for a torch device type."""
    choices = [f"'vllm-rfork[{extra}]' for {purpose}" for extra, purpose in _EXTRAS.get(device_type, {}).items()]
    return f"install one of its wheels: pip install {' or '.join(choices)}"


def device_of_machine() -> str:
    """The torch device type whose memory workers of this machine most likely have."""
    return next((kind for kind, file in _DRIVERS.items() if file.exists()), "cpu")
