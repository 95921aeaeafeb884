"""Reads from published releases what is relied on here, without importing them: ``python -m tests.ascend.record``.

    python -m tests.ascend.record vllm_ascend 0.23.0 FOLDER     # FOLDER: an unpacked wheel
    python -m tests.ascend.record torch_npu 2.14.0 FOLDER

What was found lies in ``recorded/``, one file a release, and ``test_symbols.py`` checks it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_rfork.vllm_compat.ascend import PROCESS_WIDE, SHARED_EXPERT_CHECK

RECORDED = Path(__file__).parent / "recorded"

#: Folders of vLLM-Ascend whose code runs while a model is built, loaded and post-processed.
FOLDERS = ("attention", "ops", "quantization", "models", "_310p", "utils.py")
#: Functions that post-processing runs, besides those that say so by their name.
POST_PROCESSING = re.compile(
    r"process_weights|_init_o_proj_tp|process_scale|update_bias|pack_to_int32|post_process_after_loading"
)
#: Calls that tell what happens to weights.
TELLING = frozenset({"dispose_layer", "dispose_tensor", "npu_format_cast", "maybe_trans_nz", "item", "set_", "unbind"})


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function and its dotted name, those in classes and under conditions included."""

    def inside(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from inside(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                yield prefix + child.name, child
            elif isinstance(child, (ast.If, ast.Try)):
                yield from inside(child, prefix)

    return inside(tree, "")


def _described(function: ast.FunctionDef) -> dict[str, Any]:
    sets, deletes, calls = set(), set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute):
            plain = isinstance(node.value, ast.Name) and node.value.id in ("self", "layer")
            if isinstance(node.ctx, ast.Store) and plain:
                sets.add(node.attr)
            if isinstance(node.ctx, ast.Store) and node.attr == "data" and isinstance(node.value, ast.Attribute):
                sets.add(node.value.attr)
            if isinstance(node.ctx, ast.Del):
                deletes.add(node.attr)
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in TELLING:
                calls.add(called)
            if called == "register_parameter" and isinstance(node.args[0], ast.Constant):
                sets.add(str(node.args[0].value))
    return {"sets": sorted(sets), "deletes": sorted(deletes), "calls": sorted(calls)}


def _on_classes(tree: ast.Module) -> set[str]:
    """``Class.attribute`` wherever a function assigns one, or an element of it."""
    found = set()
    for _, function in _functions(tree):
        for node in ast.walk(function):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) else ():
                place = target.value if isinstance(target, ast.Subscript) else target
                holder = getattr(place, "value", None)
                if isinstance(place, ast.Attribute) and isinstance(holder, ast.Name) and holder.id[:1].isupper():
                    found.add(f"{holder.id}.{place.attr}")
    return found


def _defined(tree: ast.Module, dotted: str) -> bool:
    owner, _, name = dotted.rpartition(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            return any(_binds(item, name) for item in node.body)
        if not owner and node in tree.body and _binds(node, name):
            return True
    # An object of a class in the same file.
    return bool(owner) and not owner[:1].isupper() and _defined(tree, owner) and f"self.{name}" in ast.unparse(tree)


def _binds(node: ast.AST, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _got_from(tree: ast.Module, mapping: str) -> list[str]:
    """Keys that code asks ``mapping`` for, by itself or by the helper that also looks into the environment."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            place = {f"{mapping}.get": 0, "self._get_config_value": 1}.get(called)
            if place is not None and isinstance(node.args[place], ast.Constant):
                found.add(str(ast.literal_eval(node.args[place])))
    return sorted(found)


def vllm_ascend(root: Path) -> dict[str, Any]:
    """What a fork relies on in vLLM-Ascend."""
    trees = {
        str(file.relative_to(root)): ast.parse(file.read_text())
        for folder in FOLDERS
        for file in sorted([*(root / folder).rglob("*.py"), *root.glob(folder)])
        if file.is_file()
    }
    functions = {
        f"{file}: {name}": _described(function)
        for file, tree in trees.items()
        for name, function in _functions(tree)
        if POST_PROCESSING.search(name)
    }
    checks = {
        f"{file}: {name}"
        for file, tree in trees.items()
        for name, function in _functions(tree)
        if name.endswith("__init__") and f"self.{SHARED_EXPERT_CHECK}()" in ast.unparse(function)
    }
    wide = {}
    for module, names in PROCESS_WIDE.items():
        file = root.parent.joinpath(*module.split(".")).with_suffix(".py")
        tree = ast.parse(file.read_text()) if file.exists() else ast.Module([], [])
        wide[module] = [name for name in names if _defined(tree, name)]
    config = ast.parse((root / "ascend_config.py").read_text())
    eplb = [
        str(key.value)
        for node in ast.walk(config)
        if isinstance(node, ast.ClassDef) and node.name == "EplbConfig"
        for inner in ast.walk(node)
        if isinstance(inner, ast.Dict)
        for key in inner.keys
        if isinstance(key, ast.Constant)
    ]
    return {
        "post_processing": functions,
        "shared_expert_checks": sorted(checks),
        "on_classes": sorted(set().union(*map(_on_classes, trees.values()))),
        "process_wide": wide,
        "additional_config": _got_from(config, "additional_config"),
        "eplb_config": sorted(set(eplb)),
        "expandable_by_default": "expandable_segments:True" in (root / "platform.py").read_text(),
    }


def torch_npu(root: Path) -> dict[str, Any]:
    """What the NPU side calls: operators by their schema, functions by their parameters."""
    schemas: dict[str, str] = {}
    for file in sorted((root / "csrc" / "aten").glob("*.yaml")):
        for match in re.finditer(r"func: (\w+)(\([^\n]*\) -> [^\n]*)", file.read_text()):
            schemas.setdefault(match[1], match[2])
    wanted = ("get_npu_format", "empty_with_format", "npu_format_cast")
    functions = {}
    for file in ("memory.py", "utils.py"):
        for name, function in _functions(ast.parse((root / "npu" / file).read_text())):
            if name in ("synchronize", "empty_cache", "current_device", "set_device", "memory_snapshot"):
                functions[name] = [argument.arg for argument in function.args.args]
    formats = {}
    for node in ast.walk(ast.parse((root / "npu" / "_format.py").read_text())):
        if isinstance(node, ast.ClassDef) and node.name == "Format":
            for item in node.body:
                if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
                    formats[item.targets[0].id] = ast.literal_eval(item.value)
    return {
        "operators": {name: schemas[name] for name in wanted if name in schemas},
        "npu": functions,
        "formats": formats,
        "weak_ref_tensor": "from torch_npu._C import _weak_ref_tensor" in (root / "npu" / "graphs.py").read_text(),
    }


if __name__ == "__main__":
    package, version, folder = sys.argv[1:]
    read = {"vllm_ascend": vllm_ascend, "torch_npu": torch_npu}[package]
    RECORDED.mkdir(exist_ok=True)
    record = {"package": package, "version": version, **read(Path(folder) / package)}
    (RECORDED / f"{package}-{version}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
