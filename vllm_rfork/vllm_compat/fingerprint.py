"""The facts that shape a worker's bytes, as plain data for :func:`~vllm_rfork.seed_key.build_fingerprint`.

Which options count, in which layout, and which do not and why, is in :mod:`~vllm_rfork.vllm_compat.shaping` and
:mod:`~vllm_rfork.vllm_compat.shaping_environment`. Of the ranks only those are here that the seed key has no place for:
without expert parallelism, experts are cut across data and context parallel ranks as well.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

from vllm_rfork import __version__
from vllm_rfork.vllm_compat import shaping
from vllm_rfork.vllm_compat.identity import is_draft
from vllm_rfork.vllm_compat.plain import plain
from vllm_rfork.vllm_compat.shaping_environment import shaping_environment

#: Keys of a Hugging Face configuration that say where a model came from or how it talks, not what its bytes are.
#: ``_name_or_path``: the same model may lie in different folders. ``transformers_version``: the writer's version.
#: Generation defaults: sampling only.
VOLATILE = frozenset(
    {
        "_name_or_path",
        "name_or_path",
        "transformers_version",
        "_commit_hash",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "id2label",
        "label2id",
        "task_specific_params",
    }
)

#: What building and loading write into a quantization's configuration: the model's class decides, or a clock.
WRITTEN_BY_LOADING = frozenset({"packed_modules_mapping", "quantized_layers", "online_quantization_time"})

#: Entry points of these groups run inside workers and may change how models are built or processed.
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")


def fingerprint_facts(
    vllm_config: Any,
    model_config: Any,
    *,
    layout: str,
    engine: str,
    device: torch.device,
    dummy: bool,
    context_rank: int = 0,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """Everything that shapes the bytes in memory in ``layout``.

    What chooses kernels counts in the runtime layout alone. ``dummy``: weights are random ones, drawn from the seed.
    """
    runtime = layout == "runtime"
    facts: dict[str, Any] = {
        "plugin": __version__,
        "vllm": _version_of("vllm"),
        "plugins": _plugins(),
        "torch": torch.__version__.partition("+")[0],
        "layout": layout,
        "engine": engine,
        "device": _device_generation(device, runtime=runtime),
        "architectures": list(getattr(model_config.hf_config, "architectures", None) or []),
        "hf_config": plain(model_config.hf_config.to_dict(), leave_out=VOLATILE),
        "kind": [plain(getattr(model_config, name, None)) for name in ("runner_type", "convert_type")],
        "quant_config": _quantization(vllm_config, model_config),
        "options": _options(vllm_config, model_config, runtime=runtime),
        "additional_config": _additional_config(vllm_config),
        "environment": shaping_environment(environ, runtime=runtime),
        "context_rank": context_rank,
        "draft": is_draft(vllm_config, model_config),
        "dummy_weights": [getattr(model_config, "seed", None)] if dummy else None,
    }
    if runtime:
        found = {name: _version_of(name) for name in shaping.KERNEL_DISTRIBUTIONS}
        facts["kernels"] = {name: version for name, version in found.items() if version is not None}
    return facts


def _options(vllm_config: Any, model_config: Any, *, runtime: bool) -> dict[str, Any]:
    """Section → field → value; a section or field that this vLLM does not have is not there."""
    options: dict[str, Any] = {}
    for section, path in shaping.SECTIONS.items():
        found = _at(vllm_config, model_config, path)
        if found is None:
            continue
        names = shaping.ALWAYS.get(section, ()) + (shaping.IN_RUNTIME.get(section, ()) if runtime else ())
        options[section] = {name: plain(getattr(found, name)) for name in names if hasattr(found, name)}
    whole = {**shaping.WHOLE_ALWAYS, **(shaping.WHOLE_IN_RUNTIME if runtime else {})}
    for section, path in whole.items():
        found = _at(vllm_config, model_config, path)
        if found is not None:
            options[section] = plain(found)
    return options


def _at(vllm_config: Any, model_config: Any, path: str) -> Any:
    first, *rest = path.split(".")
    found = model_config if first == "model" else getattr(vllm_config, first, None)
    for name in rest:
        found = getattr(found, name, None)
    return found


def _quantization(vllm_config: Any, model_config: Any) -> Any:
    """The target's; a draft is built from its own model configuration, and by then loading the target has written to
    this object, otherwise from storage than by a fork."""
    if is_draft(vllm_config, model_config):
        return None
    return plain(getattr(vllm_config, "quant_config", None), leave_out=WRITTEN_BY_LOADING)


def _additional_config(vllm_config: Any) -> Any:
    """A dict, or an object of the platform's plugin."""
    left_out = {name for names in shaping.ADDITIONAL_LEFT_OUT.values() for name in names}
    return plain(getattr(vllm_config, "additional_config", None) or {}, leave_out=frozenset(left_out))


def _device_generation(device: torch.device, *, runtime: bool) -> dict[str, Any]:
    """In the checkpoint layout the receiver post-processes for its own device: of the device, what decides about
    structure counts."""
    facts: dict[str, Any] = {"type": device.type}
    if device.type == "cpu":
        facts["machine"] = platform.machine()
        if runtime:
            facts["capability"] = torch.backends.cpu.get_cpu_capability()
        return facts
    if device.type == "cuda":
        facts["capability"] = list(torch.cuda.get_device_capability(device))
        if runtime:
            facts["toolkit"] = torch.version.cuda or torch.version.hip
    backend = getattr(torch, device.type, None)
    if backend is not None and hasattr(backend, "get_device_name") and (runtime or device.type != "cuda"):
        facts["name"] = str(backend.get_device_name(device))
    return facts


@functools.cache
def _plugins() -> dict[str, str]:
    """Distributions whose plugins run in workers, with their versions; this one counts by itself."""
    points = [point for group in PLUGIN_GROUPS for point in metadata.entry_points(group=group)]
    found = {point.dist.name: point.dist.version for point in points if point.dist is not None}
    return {name: version for name, version in sorted(found.items()) if name != "vllm-rfork"}


@functools.cache
def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        if distribution != "vllm":
            return None
        import vllm

        return str(vllm.__version__)
