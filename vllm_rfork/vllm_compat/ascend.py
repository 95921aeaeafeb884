"""Differences of vLLM-Ascend from vLLM that matter to a fork, as read in its releases 0.18 and 0.23.

``docs/ascend.md`` cites their source line by line, and ``tests/ascend`` compares the names below with the published
releases. ``vllm_ascend`` is not imported: if its modules are not loaded, there is nothing to do.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from vllm_rfork.errors import VerificationError

#: Method of an MoE layer with overlapped shared experts. At the end of post-processing it compares two ways to compute
#: them on random input. With dummy weights both give NaN, and NaN is never equal.
SHARED_EXPERT_CHECK = "_validate_shared_expert_consistency"

#: Tensors in classes, which no traversal of a model reaches, and the reasons why they need not be published.
CLASS_LEVEL: dict[str, str] = {
    "q_hadamard": "a constant that every process computes from the number 128 while post-processing",
    "k_hadamard": "a constant that every process computes from the number 128 while post-processing",
    "hadamard": "a constant that the metadata builder computes from the head's size after loading",
    "o_proj_full_pool": "filled in every step that uses it",
    "o_proj_full_pools": "filled in every step that uses it",
    "wo_a_full_pool": "filled in every step that uses it",
    "wo_a_full_weight_scale_pool": "filled in every step that uses it",
    "wo_b_full_pool": "filled in every step that uses it",
    "wo_b_full_weight_scale_pool": "filled in every step that uses it",
}

#: Module → dotted names in it that construction changes. Containers are restored by content, everything else by value.
#: The rotary tables need it: the first model's table lives as long as the process, and a failed fork has written to it.
#: The counters number MoE layers, which find their expert maps by it, and row-parallel layers, whose names contain it.
PROCESS_WIDE: dict[str, tuple[str, ...]] = {
    "vllm_ascend.ops.rotary_embedding": ("_cos_sin_cache", "_cos_cache", "_sin_cache"),
    "vllm_ascend.ops.fused_moe.fused_moe": ("AscendFusedMoE.moe_counter", "AscendMoERunner.moe_counter"),
    "vllm_ascend.ops.fused_moe.fused_moe_0_23_0": ("AscendFusedMoE.moe_counter",),
    "vllm_ascend.ops.linear": ("AscendRowParallelLinear.unique_prefix_idx",),
    "vllm_ascend.eplb.adaptor.vllm_adaptor": ("VllmEplbAdaptor._registered_moe_layers",),
    "vllm_ascend.ops.layer_shard_linear": ("_series_dict", "_layer_external_dict"),
    "vllm_ascend.ops.flashcomm2_oshard_manager": ("flashcomm2_oshard_manager._shard_layers",),
}


class PostponedChecks:
    """Checks that must not run on dummy weights; :meth:`run` runs them later. Keeps no model alive."""

    def __init__(self) -> None:
        self._silenced: list[weakref.ref[nn.Module]] = []
        self._asked: list[weakref.ref[nn.Module]] = []

    def silence(self, module: nn.Module) -> None:
        """Make ``module``'s check only record that it was called."""
        # The wrapper around post-processing looks the method up on the instance.
        vars(module)[SHARED_EXPERT_CHECK] = functools.partial(self._asked.append, weakref.ref(module))
        self._silenced.append(weakref.ref(module))

    def run(self) -> None:
        """Restore every check, and run those that post-processing has called, on the current weights.

        Raises:
            VerificationError: one failed.
        """
        silenced, self._silenced = self._silenced, []
        for module in _living(silenced):
            vars(module).pop(SHARED_EXPERT_CHECK, None)
        asked = list(self._asked)
        self._asked.clear()
        for module in _living(asked):
            try:
                getattr(module, SHARED_EXPERT_CHECK)()
            except Exception as error:
                raise VerificationError(f"vLLM-Ascend's own check of shared experts failed: {error}") from error


def _living(references: list[weakref.ref[nn.Module]]) -> list[nn.Module]:
    return [module for module in (reference() for reference in references) if module is not None]


def postpone_checks(model: nn.Module) -> PostponedChecks:
    """Postpone the checks of post-processing until :meth:`PostponedChecks.run`, because dummy weights fail them."""
    checks = PostponedChecks()
    for module in model.modules():
        if callable(getattr(module, SHARED_EXPERT_CHECK, None)):
            checks.silence(module)
    return checks


def moving_weights_obstacle(additional_config: Any) -> str | None:
    """The setting of vLLM-Ascend that lets weights change place or content while serving; None if there is none."""
    if not isinstance(additional_config, Mapping):
        return None
    eplb = additional_config.get("eplb_config")
    # A map of experts enables dynamic balancing as well.
    if isinstance(eplb, Mapping) and any(
        eplb.get(key) for key in ("dynamic_eplb", "expert_map_path", "expert_map_record_path")
    ):
        return "expert load balancing moves weights while serving (additional_config eplb_config)"
    if sharded := additional_config.get("layer_sharding"):
        return f"layers' weights are broadcast into shared windows while serving (layer_sharding {sharded})"
    return None


def process_wide() -> Iterator[tuple[Any, str, Any]]:
    """Everything that construction has entered process-wide: the holder, the attribute's name and its value."""
    for module_name, names in PROCESS_WIDE.items():
        module = sys.modules.get(module_name)
        if module is None:
            continue
        for dotted in names:
            owner, _, name = dotted.rpartition(".")
            holder = getattr(module, owner, None) if owner else module
            if hasattr(holder, name):
                yield holder, name, getattr(holder, name)


def class_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors in the classes of ``model``'s modules and attention implementations, by class and attribute."""
    classes = {type(thing) for module in model.modules() for thing in (module, getattr(module, "impl", None))}
    return {
        f"{kind.__name__}.{name}": value
        for of in sorted(classes, key=lambda kind: (kind.__module__, kind.__qualname__))
        for kind in of.__mro__
        for name, value in vars(kind).items()
        if isinstance(value, torch.Tensor)
    }


def unknown_class_tensors(model: nn.Module) -> list[str]:
    """The names in :func:`class_tensors` that are not in :data:`CLASS_LEVEL`, so that they may be weights."""
    return sorted(name for name in class_tensors(model) if name.rpartition(".")[2] not in CLASS_LEVEL)
