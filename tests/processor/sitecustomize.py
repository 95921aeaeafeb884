"""Hides features of the processor from every Python process of a test run, so that vLLM takes its other code paths.

``tests/conftest.py`` puts this folder on PYTHONPATH if TEST_CPU is set (``make test TEST_CPU=avx512``):

- ``avx512``: AVX-512 without bfloat16 and without AMX, as on Ice Lake: oneDNN packs weights, attention uses no tiles.
- ``avx2``: no AVX-512 at all, as on older processors from AMD and Intel.

vLLM decides by ``torch.cpu.get_capabilities`` in Python; oneDNN and torch's own kernels are limited by environment
variables. A feature that a processor lacks cannot be added.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence

#: Value of TEST_CPU -> prefixes of the features that it hides, and variables of the native libraries.
PROCESSORS = {
    "avx512": (
        ("amx", "avx10", "avx512_bf16", "avx512_fp16"),
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "ATEN_CPU_CAPABILITY": "avx512"},
    ),
    "avx2": (("amx", "avx10", "avx512"), {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}),
}


class HidesFeatures(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Wraps ``torch.cpu`` when it is imported."""

    def __init__(self, hidden: tuple[str, ...]) -> None:
        self._hidden = hidden
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == "torch.cpu" else None
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        assert self._loader is not None
        self._loader.exec_module(module)
        found = module.get_capabilities
        module.get_capabilities = lambda: {  # type: ignore[attr-defined]
            name: value and not name.startswith(self._hidden) if isinstance(value, bool) else value
            for name, value in found().items()
        }


def emulate(processor: str) -> None:
    """Hide what ``processor`` lacks from this process, which must not have imported torch."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already, and may have looked at the processor")
    hidden, variables = PROCESSORS[processor]
    os.environ.update(variables)
    sys.meta_path.insert(0, HidesFeatures(hidden))


if os.environ.get("TEST_CPU"):
    emulate(os.environ["TEST_CPU"])
