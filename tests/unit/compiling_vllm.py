"""Stand-in modules for vLLM's compilation, with the signatures and the order of calls of 0.26 and 0.32.

Only what hooks meet: a forward that is looked for, compiled and saved, and split graphs beside it. Compiled code is a
file that contains its own source.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from vllm_rfork.vllm_compat.start_up import compile_hooks
from vllm_rfork.vllm_compat.start_up.listener import CachePlace

MODULES = ("vllm", "vllm.compilation", "vllm.config")


@dataclasses.dataclass
class Section:
    """One section of a configuration, hashed as vLLM does it."""

    values: dict[str, Any]

    def compute_hash(self) -> str:
        from vllm.config.utils import hash_factors

        return str(hash_factors(self.values))


@dataclasses.dataclass
class Config:
    """``VllmConfig``, with the attributes that hooks read."""

    model_config: Section
    compilation_config: Any = None
    load_config: Any = dataclasses.field(default_factory=lambda: types.SimpleNamespace(device=None))
    device_config: Any = dataclasses.field(default_factory=lambda: types.SimpleNamespace(device="cpu"))

    def compute_hash(self) -> str:
        return hashlib.sha256(self.model_config.compute_hash().encode()).hexdigest()[:10]


def config(path: str, sources: set[str] = frozenset(), **values: Any) -> Config:  # type: ignore[assignment]
    """A configuration of the model at ``path``; ``sources``: the files that are traced while it is compiled."""
    made = Config(Section({"model": path, "hf_config": "{}", "max_model_len": 256, **values}))
    made.compilation_config = types.SimpleNamespace(sources=set(sources), traced_files=set(), cache_dir="")
    return made


class Vllm:
    """The stand-in of one release; ``start`` is one start of a worker.

    Attributes:
        loads: vLLM can load the compiled forward; its 0.32 on CPU cannot.
        saves: it can save it.
        builds_kernels: a forward that is loaded does not find all of its kernels.
    """

    def __init__(self, version: str, patch: pytest.MonkeyPatch) -> None:
        self.loads = self.saves = True
        self.builds_kernels = False
        self.envs = types.ModuleType("vllm.envs")
        self.envs.__dict__.update(
            VLLM_CACHE_ROOT="", VLLM_USE_AOT_COMPILE=True, VLLM_USE_MEGA_AOT_ARTIFACT=False, VLLM_FORCE_AOT_LOAD=False,
            VLLM_COMPILE_CACHE_SAVE_FORMAT="binary", compile_factors=lambda: {"VLLM_API_KEY": "hidden"},
        )  # fmt: skip
        self.decorators = _decorators(self, tagged=version == "0.32.0")
        self.backends = _backends(self)
        utils, interface = types.ModuleType("vllm.config.utils"), types.ModuleType("vllm.compilation.interface")
        utils.__dict__["hash_factors"] = lambda items: hashlib.sha256(repr(sorted(items.items())).encode()).hexdigest()
        interface.__dict__["get_inductor_factors"] = lambda: ["settings"]
        for name in MODULES:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["vllm"].__dict__.update(__version__=version, envs=self.envs)
        for name, module in {
            "vllm.envs": self.envs,
            "vllm.config.utils": utils,
            "vllm.compilation.decorators": self.decorators,
            "vllm.compilation.backends": self.backends,
            "vllm.compilation.compiler_interface": interface,
        }.items():
            patch.setitem(sys.modules, name, module)
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)

    def start(self, root: Path, vllm_config: Config) -> Any:
        """Construct a model and call it once, with ``root`` as VLLM_CACHE_ROOT; returns the model."""
        self.envs.__dict__["VLLM_CACHE_ROOT"] = str(root)
        model = self.decorators.Model(vllm_config)
        model()
        return model


def _decorators(vllm: Vllm, *, tagged: bool) -> Any:
    module: Any = types.ModuleType("vllm.compilation.decorators")

    def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> str | None:
        if not os.path.exists(aot_compilation_path):
            if vllm.envs.VLLM_FORCE_AOT_LOAD:
                raise FileNotFoundError(aot_compilation_path)
            return None
        model.vllm_config.compilation_config.traced_files |= model.vllm_config.compilation_config.sources
        if vllm.builds_kernels:
            Path(aot_compilation_path).parents[1].joinpath("inductor_cache", "other.so").write_text("kernel")
        try:
            if not vllm.envs.VLLM_USE_MEGA_AOT_ARTIFACT:
                vllm.backends.VllmBackend(model.vllm_config, "backbone")("graph", [])
        except RuntimeError:
            return None
        return Path(aot_compilation_path).read_text() if vllm.loads else None

    class Model:
        def __init__(self, vllm_config: Config) -> None:
            self.vllm_config = vllm_config
            self.compiled_by_itself = False
            if tagged:
                self._compile_tag = "backbone"

        def forward(self) -> None: ...

        def __call__(self) -> None:
            key = hashlib.sha256(f"{self.vllm_config.compute_hash()}".encode()).hexdigest()
            folder = Path(vllm.envs.VLLM_CACHE_ROOT, "torch_compile_cache", "torch_aot_compile", key)
            (folder / "inductor_cache").mkdir(parents=True, exist_ok=True)
            self._aot_compilation_path = str(folder / "rank_0_0" / "model")
            self.aot_compiled_fn = module._try_load_aot_compiled_fn(self, self._aot_compilation_path)
            if self.aot_compiled_fn is None:
                self.compiled_by_itself = True
                (folder / "inductor_cache" / "kernel.so").write_text("kernel")
                compilation = self.vllm_config.compilation_config
                compilation.traced_files |= compilation.sources
                vllm.backends.VllmBackend(self.vllm_config, "backbone")("graph", [])
                self.save_aot_compiled_function()

        def save_aot_compiled_function(self) -> None:
            if vllm.saves:
                os.makedirs(os.path.dirname(self._aot_compilation_path), exist_ok=True)
                Path(self._aot_compilation_path).write_text("forward")
                Path(self._aot_compilation_path).with_name("notes").write_text("not read by vLLM")

    module._try_load_aot_compiled_fn, module.Model = _try_load_aot_compiled_fn, Model
    return module


def _backends(vllm: Vllm) -> Any:
    module: Any = types.ModuleType("vllm.compilation.backends")

    class CompilerManager:
        def __init__(self) -> None:
            self.cache: dict[Any, Any] = {}
            self.is_cache_updated = False

        def initialize_cache(self, cache_dir: str, disable_cache: bool = False, prefix: str = "") -> None:
            self.disable_cache, self.file = disable_cache, Path(cache_dir, "vllm_compile_cache.py")
            if not disable_cache and self.file.exists():
                self.cache = ast.literal_eval(self.file.read_text())

        def graph(self) -> str:
            """Load the one graph by the absolute path in the index, or compile it."""
            key = ((1, 2048), 0, "inductor_standalone")
            if key in self.cache:
                handle = Path(self.cache[key]["graph_handle"][1])
                assert handle.parent == self.file.parent  # not another worker's
                return handle.read_text()
            name = "artifact_compile_range_1_2048_subgraph_0"
            if not vllm.envs.VLLM_USE_MEGA_AOT_ARTIFACT:
                path = self.file.with_name(name)
                path.write_text("graph")
                self.cache[key] = {"graph_handle": (name, str(path)), "cache_key": "abc"}
                self.is_cache_updated = True
            return "graph"

        def save_to_file(self) -> None:
            if not self.disable_cache and self.is_cache_updated:
                self.file.write_text(repr(self.cache))

    class VllmBackend:
        def __init__(self, vllm_config: Config, prefix: str = "", is_encoder: bool = False) -> None:
            self.vllm_config, self.compilation_config = vllm_config, vllm_config.compilation_config
            self.prefix, self.compiler_manager = prefix, CompilerManager()

        def __call__(self, graph: Any, example_inputs: list[Any]) -> None:
            code = hashlib.sha256("".join(sorted(self.compilation_config.traced_files)).encode()).hexdigest()
            self.compilation_config.traced_files.clear()
            key = hashlib.sha256(f"{self.vllm_config.compute_hash()}{code}".encode()).hexdigest()[:10]
            folder = Path(vllm.envs.VLLM_CACHE_ROOT, "torch_compile_cache", key, "rank_0_0", self.prefix)
            folder.mkdir(parents=True, exist_ok=True)
            self.compiler_manager.initialize_cache(str(folder), False, self.prefix)
            (folder / "cache_key_factors.json").write_text('{"env": {"VLLM_API_KEY": "hidden"}}')
            if self.compiler_manager.graph() != "graph":
                raise RuntimeError("the graph cannot be loaded")
            self.compiler_manager.save_to_file()
            (folder / "computation_graph.py").write_text("for readers")

    module.CompilerManager, module.VllmBackend = CompilerManager, VllmBackend
    return module


def compiled_forwards(vllm: Vllm, root: Path) -> list[CachePlace]:
    """The forwards of ``llama.LlamaModel`` and ``llama_eagle3.LlamaModel``, whose names and configuration are equal."""
    vllm.envs.__dict__["VLLM_CACHE_ROOT"] = str(root)
    places = []
    for line, folder in ((350, "a" * 64), (180, "b" * 64)):
        names: dict[str, Any] = {}
        exec(compile("\n" * line + "class LlamaModel:\n    def forward(self): ...\n", "llama.py", "exec"), names)
        model = names["LlamaModel"]()
        model.vllm_config = config("/models/llama")
        path = root / "torch_compile_cache" / "torch_aot_compile" / folder / "rank_0_0" / "model"
        places.append(compile_hooks._Forward.of(model, str(path)).aot)
    return places
