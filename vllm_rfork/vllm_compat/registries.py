"""vLLM's process-wide registries, which a second model in one process would collide with.

Layers register themselves by name while a model is constructed. After a failed model, a second one would fail with
"Duplicate layer name" or, worse, use the first one's caches. The registries are restored to what they were before the
first model, not cleared: they may contain the target model when a draft fails.
"""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vllm_rfork.vllm_compat import ascend

#: Module → dicts in it to which construction or loading adds a model. The first contains names of layers of other
#: pipeline stages, by the model's ``id``; a later model may get the same ``id`` once the failed one is freed.
_ENTERED = {
    "vllm.model_executor.models.utils": ("_model_to_pp_missing_layer_names",),
    "vllm.model_executor.layers.hpc.rope_norm": ("_hpc_rope_norm_instances",),
}


@dataclass
class Registries:
    """The contents of every registry at one moment. Keys and order are kept; the objects are the same ones."""

    _mappings: list[tuple[dict[Any, Any], dict[Any, Any]]]
    _lists: list[tuple[list[Any], list[Any]]]
    _attributes: list[tuple[Any, str, Any]] = field(default_factory=list)

    @classmethod
    def capture(cls, vllm_config: Any) -> Registries:
        """The present contents of the registries in ``vllm_config`` and vLLM's modules."""
        compilation = vllm_config.compilation_config
        mappings = [compilation.static_forward_context, _rope_cache(), _compile_hooks()]
        lists = [compilation.static_all_moe_layers] if hasattr(compilation, "static_all_moe_layers") else []
        mappings += _entered()
        # Models translate the names in it to theirs, and some translations differ when they are made twice.
        quantization = getattr(vllm_config, "quant_config", None)
        attributes = [
            (quantization, name, _shallow(value)) for name, value in getattr(quantization, "__dict__", {}).items()
        ]
        for holder, name, value in ascend.process_wide():
            if isinstance(value, dict):
                mappings.append(value)
            elif isinstance(value, list):
                lists.append(value)
            else:
                attributes.append((holder, name, value))
        return cls([(live, dict(live)) for live in mappings], [(live, list(live)) for live in lists], attributes)

    def storages(self) -> frozenset[int]:
        """Addresses of the storages behind the tensors of modules that a model built from now on may share."""
        modules = [module for module in _rope_cache().values() if isinstance(module, nn.Module)]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def restore(self) -> None:
        """Put everything back, in place: vLLM holds references to these very objects."""
        for mapping, before in self._mappings:
            mapping.clear()
            mapping.update(before)
        for sequence, earlier in self._lists:
            sequence[:] = earlier
        for holder, name, value in self._attributes:
            setattr(holder, name, value)


def _entered() -> list[dict[Any, Any]]:
    modules = ((sys.modules.get(name), names) for name, names in _ENTERED.items())
    found = [getattr(module, name, None) for module, names in modules for name in names]
    return [each for each in found if isinstance(each, dict)]


def _shallow(value: Any) -> Any:
    return copy.copy(value) if type(value) in (dict, list, set) else value


def _rope_cache() -> dict[Any, Any]:
    """The cache of rotary embeddings, by which models in one process share their cos/sin tables."""
    module = importlib.import_module("vllm.model_executor.layers.rotary_embedding")
    cache: dict[Any, Any] = module._ROPE_DICT
    return cache


def _compile_hooks() -> dict[Any, Any]:
    """torch's bytecode hooks: each compiled model enters a method of its own, which would keep it in memory."""
    module = importlib.import_module("torch._dynamo.convert_frame")
    hooks: dict[Any, Any] = getattr(module, "_bytecode_hooks", {})
    return hooks
