"""The facts that shape a worker's bytes, as plain data for :func:`~vllm_rfork.seed_key.build_fingerprint`.

``config_fields.py``, ``environment.py``, ``packages.py`` and ``ignored.json`` say which options, variables and packages
count in which layout. Of the ranks, only those outside the seed key are here: without expert parallelism, experts are
split across data and context parallel ranks as well.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch

from vllm_rfork import __version__
from vllm_rfork.vllm_compat.fingerprint import config_fields, installed, packages
from vllm_rfork.vllm_compat.fingerprint.canonical import plain
from vllm_rfork.vllm_compat.fingerprint.environment import shaping_environment
from vllm_rfork.vllm_compat.worker_identity import is_draft

#: Keys of a Hugging Face configuration that do not describe bytes: where the model is (``_name_or_path``), which
#: version wrote the file (``transformers_version``), and defaults for generation.
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

#: Fields of a quantization's configuration that building and loading write: by the model's class, or from a clock.
WRITTEN_BY_LOADING = frozenset({"packed_modules_mapping", "quantized_layers", "online_quantization_time"})

#: Parts of names in the configuration of a model with experts.
WORDS_FOR_EXPERTS = ("expert", "moe")


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

    Args:
        dummy: weights are random, drawn from the seed.
        context_rank: this worker's rank among those of context parallelism.
    """
    runtime = layout == "runtime"
    facts_of_model = plain(model_config.hf_config.to_dict(), ignored=VOLATILE)
    facts: dict[str, Any] = {
        "plugin": __version__,
        "vllm": _version_of_vllm(),
        "plugins": installed.plugins(environ),
        "libraries": installed.modules(packages.BOTH_LAYOUTS),
        "torch": torch.__version__.partition("+")[0],
        "layout": layout,
        "engine": engine,
        "device": _device_generation(device, runtime=runtime),
        "architectures": list(getattr(model_config.hf_config, "architectures", None) or []),
        "hf_config": facts_of_model,
        "kind": [plain(getattr(model_config, name, None)) for name in ("runner_type", "convert_type")],
        "quant_config": _quantization(vllm_config, model_config),
        "options": _options(vllm_config, model_config, runtime=runtime),
        "additional_config": _additional_config(vllm_config),
        "environment": shaping_environment(environ, runtime=runtime),
        "context_rank": context_rank,
        "draft": is_draft(vllm_config, model_config),
        "dummy_weights": [getattr(model_config, "seed", None)] if dummy else None,
        "rotary_op": _rotary_op(vllm_config, facts_of_model, device),
    }
    if runtime:
        kernels = facts["kernels"] = installed.modules(packages.RUNTIME_ONLY)
        if "flashinfer" in kernels and "flashinfer_cubin" not in kernels:
            facts["toolkit_tools"] = installed.toolkit_tools(environ)
        facts["lora"] = _experts_with_lora(vllm_config, facts_of_model)
    return facts


def _options(vllm_config: Any, model_config: Any, *, runtime: bool) -> dict[str, Any]:
    """Section → field → value, without sections and fields that this vLLM does not have."""
    options: dict[str, Any] = {}
    for section, path in config_fields.SECTIONS.items():
        found = _at(vllm_config, model_config, path)
        if found is None:
            continue
        names = config_fields.BOTH_LAYOUTS.get(section, ())
        if runtime:
            names += config_fields.RUNTIME_ONLY.get(section, ())
        options[section] = {name: plain(getattr(found, name)) for name in names if hasattr(found, name)}
    whole = dict(config_fields.WHOLE_SECTION_BOTH_LAYOUTS)
    if runtime:
        whole |= config_fields.WHOLE_SECTION_RUNTIME_ONLY
    for section, path in whole.items():
        found = _at(vllm_config, model_config, path)
        if found is not None:
            options[section] = plain(found, ignored=_names(config_fields.WHOLE_SECTION_IGNORED.get(section, {})))
    return options


def _at(vllm_config: Any, model_config: Any, path: str) -> Any:
    first, *rest = path.split(".")
    found = model_config if first == "model" else getattr(vllm_config, first, None)
    for name in rest:
        found = getattr(found, name, None)
    return found


def _quantization(vllm_config: Any, model_config: Any) -> Any:
    """The target's; None for a draft, which is built from its own model configuration.

    By the time a draft is loaded, loading the target has written to this object, and a fork writes other values.
    """
    if is_draft(vllm_config, model_config):
        return None
    return plain(getattr(vllm_config, "quant_config", None), ignored=WRITTEN_BY_LOADING)


def _additional_config(vllm_config: Any) -> Any:
    """A dict, or an object of the platform's plugin, as plain data."""
    ignored = _names(config_fields.ADDITIONAL_IGNORED)
    return plain(getattr(vllm_config, "additional_config", None) or {}, ignored=ignored)


def _names(by_reason: Mapping[str, Iterable[str]]) -> frozenset[str]:
    return frozenset(chain.from_iterable(by_reason.values()))


def _device_generation(device: torch.device, *, runtime: bool) -> dict[str, Any]:
    """The device, as far as it shapes weights: in the checkpoint layout only what decides the structure."""
    facts: dict[str, Any] = {"type": device.type}
    if device.type == "cpu":
        facts["machine"] = platform.machine()
        if runtime:
            facts["capability"] = torch.backends.cpu.get_cpu_capability()
        return facts
    if device.type == "cuda":
        facts["capability"] = list(torch.cuda.get_device_capability(device))
    if runtime:
        # torch_npu sets ``cann``; from one of its versions on, MLA's projections are packed.
        toolkits = (getattr(torch.version, name, None) for name in ("cuda", "hip", "cann"))
        facts["toolkit"] = next((str(toolkit) for toolkit in toolkits if toolkit), None)
    backend = getattr(torch, device.type, None)
    if backend is not None and hasattr(backend, "get_device_name") and (runtime or device.type != "cuda"):
        facts["name"] = str(backend.get_device_name(device))
    return facts


def _experts_with_lora(vllm_config: Any, facts_of_model: Any) -> bool:
    """True if adapters change the kernel of experts, and with it the order of the halves of ``w13``.

    The weights of a dense model are the same with adapters and without. The check for experts is broad on purpose.
    """
    if getattr(vllm_config, "lora_config", None) is None:
        return False
    return any(word in name.lower() for name, _ in _items(facts_of_model) for word in WORDS_FOR_EXPERTS)


def _rotary_op(vllm_config: Any, facts_of_model: Any, device: torch.device) -> bool | None:
    """True if ``custom_ops`` enables vLLM's rotary operation; None unless on a GPU with scaled rotary embeddings.

    With it, FlashInfer needs the table of cosines in float32; otherwise it is in the model's type. It is off by default
    with graphs and on in eager workers. Nothing else that ``custom_ops`` chooses is in memory.
    """
    if device.type != "cuda":
        return None
    scaled = ("yarn", "deepseek")
    types = [str(value) for name, value in _items(facts_of_model) if name in ("rope_type", "type")]
    if not any(word in rope for rope in types for word in scaled):
        return None
    chosen = list(getattr(getattr(vllm_config, "compilation_config", None), "custom_ops", None) or ())
    return "+rotary_embedding" in chosen or ("all" in chosen and "-rotary_embedding" not in chosen)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value in nested plain data."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name, inner
            yield from _items(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _items(inner)


def _version_of_vllm() -> str:
    """The distribution's version; the module's own if there is none (a source tree on the path)."""
    version = installed.version_of("vllm")
    if version is None:
        import vllm

        version = str(vllm.__version__)
    return version
