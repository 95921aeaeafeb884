"""Checkpoints for measurements: real architectures, written directly as safetensors. Only their size matters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

#: About 2.1 GB in bfloat16, with the proportions of a small dense model.
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "vocab_size": 32768}
#: About 2000 tiny tensors, to measure the cost of their number.
MANY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 155, "vocab_size": 256}


def write(folder: Path, shape: dict[str, int]) -> int:
    """Write a Qwen2 of ``shape`` with random weights, unless it exists; returns the bytes of its weight file."""
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_attention_heads": shape["hidden_size"] // 64,
        "num_key_value_heads": max(1, shape["hidden_size"] // 256),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        **shape,
    }
    weights = folder / "model.safetensors"
    marker = folder / "config.json"
    if weights.exists() and marker.exists() and json.loads(marker.read_text()) == config:
        return weights.stat().st_size
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(
        {name: torch.empty(size, dtype=torch.bfloat16).uniform_(-0.1, 0.1) for name, size in _tensors(config)}, weights
    )
    marker.write_text(json.dumps(config))  # last, so that an interrupted run starts again
    return weights.stat().st_size


def _tensors(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (config["vocab_size"], hidden)),
        ("model.norm.weight", (hidden,)),
        ("lm_head.weight", (config["vocab_size"], hidden)),
    ]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        found += [
            (f"{layer}.input_layernorm.weight", (hidden,)),
            (f"{layer}.post_attention_layernorm.weight", (hidden,)),
            (f"{layer}.self_attn.q_proj.weight", (hidden, hidden)),
            (f"{layer}.self_attn.q_proj.bias", (hidden,)),
            (f"{layer}.self_attn.k_proj.weight", (keys, hidden)),
            (f"{layer}.self_attn.k_proj.bias", (keys,)),
            (f"{layer}.self_attn.v_proj.weight", (keys, hidden)),
            (f"{layer}.self_attn.v_proj.bias", (keys,)),
            (f"{layer}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{layer}.mlp.gate_proj.weight", (inner, hidden)),
            (f"{layer}.mlp.up_proj.weight", (inner, hidden)),
            (f"{layer}.mlp.down_proj.weight", (hidden, inner)),
        ]
    return found
