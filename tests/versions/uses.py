"""What ``vllm_rfork`` uses of vLLM, read from its source: imports, module names in text, attributes of objects."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "vllm_rfork"
#: Dotted names that are groups of entry points.
_GROUPS = {"vllm.general_plugins", "vllm.platform_plugins"}
_MODULE = re.compile(r"vllm(_ascend)?(\.\w+)+")

#: Names under which the source has vLLM's objects, and what they are.
OBJECTS = {
    "vllm_config": "VllmConfig",
    "model_config": "ModelConfig",
    "load_config": "LoadConfig",
    "parallel_config": "ParallelConfig",
    "parallel": "ParallelConfig",
    "cache_config": "CacheConfig",
    "device_config": "DeviceConfig",
    "compilation_config": "CompilationConfig",
    "compilation": "CompilationConfig",
    "speculative": "SpeculativeConfig",
    "kv_transfer": "KVTransferConfig",
    "parallel_state": "vllm.distributed.parallel_state",
    "model_loader": "vllm.model_executor.model_loader",
    "get_world_group": "GroupCoordinator",
    "get_pp_group": "GroupCoordinator",
    "get_ep_group": "GroupCoordinator",
}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(SOURCE.rglob("*.py")):
        yield file, ast.parse(file.read_text())


def imports() -> set[str]:
    """``module:name`` of every import from vLLM, and ``module:`` of every module named in text."""
    found: set[str] = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("vllm", "vllm_ascend"):
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
                found.add(f"{node.value}:")
    return found - {f"{group}:" for group in _GROUPS}


def attributes() -> set[tuple[str, str]]:
    """Object and attribute, also where ``getattr`` or ``hasattr`` names it."""
    return {use for _, tree in trees() for node in ast.walk(tree) if (use := _use(node)) is not None}


def _use(node: ast.AST) -> tuple[str, str] | None:
    if isinstance(node, ast.Attribute):
        owner, name = _object(node.value), node.attr
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and isinstance(node.args[1], ast.Constant)
    ):
        owner, name = _object(node.args[0]), str(node.args[1].value)
    else:
        return None
    return None if owner is None else (owner, name)


def _object(node: ast.expr) -> str | None:
    if isinstance(node, ast.Call):
        return _object(node.func)
    return OBJECTS.get(node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", ""))
