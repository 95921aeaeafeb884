"""Names of vLLM's and vLLM-Ascend's appear only in ``vllm_compat``, ``loader`` and ``plugin``.

The rest of the package gets them as values: models' rules as an argument, configurations as plain facts. Module paths
count, classes, and attributes and methods of models, workers and configurations, wherever code has them as an
identifier or as text. Docstrings and comments may mention them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch

from vllm_rfork.vllm_compat.fingerprint import config_fields
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES
from vllm_rfork.vllm_compat.worker_calls import HANDS_OUT, LEAVES_WEIGHTS
from vllm_rfork.vllm_compat.worker_hooks import CAPTURES_GRAPHS, CHANGES_WEIGHTS

PACKAGE = Path(__file__).parents[2] / "vllm_rfork"
ALLOWED = (PACKAGE / "vllm_compat", PACKAGE / "loader.py", PACKAGE / "plugin.py")

#: Names of Python and of this package; arguments of vLLM's loader interface, which ``load`` passes on; the option that
#: users set; and a name of pydantic's.
OURS_TOO = frozenset(
    {"__dict__", "load_weights", "node_rank", "load_config", "model_config", "model_loader_extra_config"}
)
MODULE_PATH = re.compile(r"(?:^|[\s\"'`(])(?:vllm|vllm_ascend)\.[a-z_]\w*|\bvllm_ascend\b")


def _names() -> frozenset[str]:
    """From the tables, and from what ``vllm_compat`` asks objects for; single common words prove nothing."""
    rules = VLLM_RULES
    names = {*rules.placeholders, *rules.scratch_objects, *rules.scratch_buffers, rules.wrapped_layer}
    names |= {name for pair in (*rules.scratch_of_class, *rules.scratch_if_flag) for name in pair}
    names |= {*CHANGES_WEIGHTS, *CAPTURES_GRAPHS, *HANDS_OUT, *chain.from_iterable(LEAVES_WEIGHTS.values())}
    for table in (config_fields.BOTH_LAYOUTS, config_fields.RUNTIME_ONLY):
        names |= set(chain.from_iterable(table.values()))
    for path in ALLOWED[0].rglob("*.py"):
        names |= {
            node.args[1].value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
            if isinstance(node.args[1], ast.Constant) and not hasattr(torch.Tensor, node.args[1].value)
        }
    return frozenset(name for name in names if "_" in name.strip("_") or name.lower() != name) - OURS_TOO


def found_in(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if MODULE_PATH.search(node.value):
                yield f"line {node.lineno}: {node.value[:80]!r}"
            names = [node.value]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names = [node.name]
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            names = [node.arg]
        for name in names:
            if name in NAMES:
                yield f"line {node.lineno}: {name}"


NAMES = _names()


def test_names_of_vllm_are_only_where_they_belong() -> None:
    others = [path for path in sorted(PACKAGE.rglob("*.py")) if not any(path.is_relative_to(each) for each in ALLOWED)]
    assert [f"{path.relative_to(PACKAGE)}: {name}" for path in others for name in found_in(path.read_text())] == []
