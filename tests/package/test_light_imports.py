"""Light things stay light: whatever runs where there is no torch and no vLLM must not import them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

LIGHT = [
    "vllm_rfork",
    "vllm_rfork.plugin",
    "vllm_rfork.cli.main",
    "vllm_rfork.planner",
    "vllm_rfork.cli",
    "vllm_rfork.seed_service",
    "vllm_rfork.heartbeat",
    "vllm_rfork.clients",
    "vllm_rfork.config",
    "vllm_rfork.seed_key",
    "vllm_rfork.messages",
    "vllm_rfork.manifest.schema",
    "vllm_rfork.manifest.codec",
    "vllm_rfork.manifest.pairing",
    "vllm_rfork.manifest.segments",
    "vllm_rfork.fork.transfer",
    "vllm_rfork.net.event_loop",
    "vllm_rfork.engines.registry",
    "vllm_rfork.engines.memory",
    "vllm_rfork.engines.nixl.engine",
    "vllm_rfork.engines.yuanrong.engine",
]
HEAVY = ["torch", "vllm", "vllm_ascend", "torch_npu", "transformers", "numpy", "nixl_cu13", "nixl_cu12", "nixl", "yr"]


#: One process starts, and forks one for each module.
PROBE = """
import importlib, json, os, pkgutil, sys
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        module = importlib.import_module(name)
        for info in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
            if name != "vllm_rfork":
                importlib.import_module(info.name)
        print(json.dumps([name, sorted({each.split(".")[0] for each in sys.modules})]), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} cannot be imported")
"""


@functools.cache
def imported() -> dict[str, set[str]]:
    """Return the top-level packages that each light module imports."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *LIGHT], capture_output=True, text=True, check=False, timeout=480
    )
    assert done.returncode == 0, done.stderr
    return {name: set(packages) for name, packages in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("module", LIGHT)
def test_importing_pulls_in_neither_torch_nor_vllm_nor_an_engine(module: str) -> None:
    """With every module inside it, where it is a package, and in a process of its own."""
    assert imported()[module] & set(HEAVY) == set()
