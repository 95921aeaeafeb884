"""Make checkpoints of real architectures with random weights, with transformers' own classes and fixed seeds.

Runs in a process of its own; the folder of a model that is there already is used again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoo import quantize
from zoo.case import Case

#: Bump when anything here changes what is written; folders of another recipe are made again.
RECIPE = "1"
#: Seed of the random generator.
SEED = 1
MARKER = "zoo-recipe.json"


def make(case: Case, folder: Path) -> None:
    """Write ``case`` into ``folder``: the model, with its ``draft`` and ``adapter`` in subfolders."""
    marker = folder / MARKER
    recipe = json.dumps([RECIPE, case.recipe()])
    if marker.exists() and marker.read_text(encoding="utf-8") == recipe:
        return
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model_class = getattr(transformers, case.model_class)
    save(model_class, model_class.config_class(**case.settings), folder, SEED, device=maker_device())
    for step in case.finish:
        STEPS[step](folder)
    if case.config_changes:
        _change_config(folder, case.config_changes)
    marker.write_text(recipe, encoding="utf-8")  # last, so that an interrupted run is begun anew


def save(model_class: Any, config: Any, folder: Path, seed: int, *, device: str = "cpu") -> Path:
    """Save random bfloat16 weights for ``config`` as safetensors in ``folder``."""
    import torch

    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = model_class(config).to(torch.bfloat16)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1:
                # Wide enough that different weights give different tokens, however large the model is.
                tensor.normal_(std=min(0.2, 2.2 / tensor.shape[-1] ** 0.5))
            else:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def without_weights(source: Path, folder: Path) -> Path:
    """Copy a model's folder and its subfolders without the weights."""
    for file in source.rglob("*"):
        if file.suffix in {".json", ".txt", ".jinja"} and "safetensors" not in file.name:
            target = folder / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    json.loads((folder / "config.json").read_text())
    return folder


def maker_device() -> str:
    """Return the device for random numbers and quantization: large models take minutes on a CPU."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else str(current_platform.device_type)


def _change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _random(*shape: int) -> Any:
    import torch

    return (torch.randn(*shape) * min(0.2, 2.2 / shape[-1] ** 0.5)).to(torch.bfloat16)


def _normal_about_one(size: int) -> Any:
    import torch

    return (1 + torch.randn(size) * 0.1).to(torch.bfloat16)


# --- what else a model may need -----------------------------------------------------------------------------------


def draft(folder: Path) -> None:
    """A Llama of one layer beside the target, with the target's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {**_config(folder), "num_hidden_layers": 1}
    save(LlamaForCausalLM, LlamaConfig(**config), folder / "draft", SEED + 1)


def eagle_head(folder: Path) -> None:
    """An EAGLE head: one layer without its first norm, a projection of two hidden states, the target's embedding."""
    draft(folder)

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        hidden = tensors["model.embed_tokens.weight"].shape[1]
        kept = {
            name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if ".layers." in name and "layers.0.input_layernorm" not in name
        }
        return {**kept, "fc.weight": _random(hidden, 2 * hidden)}

    quantize.rewrite(folder / "draft", change)


def mimo_mtp(folder: Path) -> None:
    """MiMo's layout of a Qwen2: its last layer becomes the layer that predicts the token after the next one."""
    layers = _config(folder)["num_hidden_layers"] - 1

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        renamed = {
            name.replace(f"model.layers.{layers}.", "model.mtp_layers.0."): tensor for name, tensor in tensors.items()
        }
        hidden = tensors["model.embed_tokens.weight"].shape[1]
        for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            renamed[f"model.mtp_layers.0.{norm}.weight"] = _normal_about_one(hidden)
        renamed["model.mtp_layers.0.input_proj.weight"] = _random(hidden, 2 * hidden)
        return renamed

    quantize.rewrite(folder, change)
    _change_config(folder, _fewer_layers(folder, layers, "MiMoForCausalLM"))


def deepseek_mtp(folder: Path) -> None:
    """DeepSeek's layout: the last layer is the predicting one, with norms, a projection and a head of its own."""
    layers = _config(folder)["num_hidden_layers"] - 1

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        prefix = f"model.layers.{layers}"
        embedding = tensors["model.embed_tokens.weight"]
        hidden = embedding.shape[1]
        for norm in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{prefix}.{norm}.weight"] = _normal_about_one(hidden)
        tensors[f"{prefix}.eh_proj.weight"] = _random(hidden, 2 * hidden)
        tensors[f"{prefix}.embed_tokens.weight"] = embedding.clone()
        tensors[f"{prefix}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        return tensors

    quantize.rewrite(folder, change)
    _change_config(folder, _fewer_layers(folder, layers, _config(folder)["architectures"][0]))


def _fewer_layers(folder: Path, layers: int, architecture: str) -> dict[str, Any]:
    changes: dict[str, Any] = {
        "architectures": [architecture],
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 1,
    }
    if types := _config(folder).get("layer_types"):
        changes["layer_types"] = types[:layers]
    return changes


def adapter(folder: Path) -> None:
    """A LoRA adapter of rank 8 for the attention of a Llama."""
    import torch
    from safetensors.torch import save_file

    config = _config(folder)
    hidden = config["hidden_size"]
    keys = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    torch.manual_seed(SEED + 2)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in (("q_proj", hidden), ("v_proj", keys)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(8, hidden) * 0.2
            tensors[f"{place}.lora_B.weight"] = torch.randn(out, 8) * 0.2
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings))


def tokenizer(folder: Path) -> None:
    """A tokenizer of words ``t0`` to ``t255``, some of them the marks of multimodal prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    marks += ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    words = [f"t{number}" for number in range(247)] + marks
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))  # noqa: S106
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<pad>", bos_token="t2")  # noqa: S106
    made.add_special_tokens({"additional_special_tokens": marks[1:]})
    made.save_pretrained(folder)


def paligemma_processor(folder: Path) -> None:
    """PaliGemma's processor for images of 56 by 56 pixels."""
    tokenizer(folder)
    settings = {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "size": {"height": 56, "width": 56},
        "image_seq_length": 16,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def qwen2_audio_names(folder: Path) -> None:
    """The published checkpoints' names, where transformers writes one part of them twice."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        twice, once = "language_model.model.model.", "language_model.model."
        return {name.replace(twice, once): tensor for name, tensor in tensors.items()}

    quantize.rewrite(folder, change)


def qwen2_audio_processor(folder: Path) -> None:
    """Qwen2-Audio's processor: Whisper's features of three seconds."""
    tokenizer(folder)
    settings = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "Qwen2AudioProcessor",
        "feature_size": 80,
        "chunk_length": 30,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "return_attention_mask": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def llava_processor(folder: Path) -> None:
    """LLaVA's processor for images of 56 by 56 pixels."""
    tokenizer(folder)
    size = {"height": 56, "width": 56}
    image = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps({**image, "processor_class": "LlavaProcessor"}))
    settings = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "image_token": "<image>",
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))


def qwen2_vl_processor(folder: Path) -> None:
    """Qwen2-VL's processor with a small bound on pixels."""
    tokenizer(folder)
    pixels = {"min_pixels": 56 * 56, "max_pixels": 56 * 56}
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        **pixels,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _quantizing(how: Callable[[Path], dict[str, Any]]) -> Callable[[Path], None]:
    def step(folder: Path) -> None:
        _change_config(folder, {"quantization_config": how(folder)})

    return step


STEPS: dict[str, Callable[[Path], None]] = {
    "draft": draft,
    "eagle-head": eagle_head,
    "mimo-mtp": mimo_mtp,
    "deepseek-mtp": deepseek_mtp,
    "adapter": adapter,
    "tokenizer": tokenizer,
    "paligemma-processor": paligemma_processor,
    "qwen2-audio-names": qwen2_audio_names,
    "qwen2-audio-processor": qwen2_audio_processor,
    "llava-processor": llava_processor,
    "qwen2-vl-processor": qwen2_vl_processor,
    **{name: _quantizing(how) for name, how in quantize.FORMATS.items()},
}
