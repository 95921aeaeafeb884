"""Tiny random-weight checkpoints of real architectures, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

#: Seeds of the random generator: two checkpoints of one shape with different weights.
WEIGHTS_A, WEIGHTS_B = 1, 2


def qwen2(folder: Path, *, seed: int = WEIGHTS_A, **changes: Any) -> Path:
    """A Qwen2 of two layers with biases, grouped heads and an untied head; about 0.7 MB."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 128,  # four heads of 32: the smallest that attention on CPU takes
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    return save(Qwen2ForCausalLM, Qwen2Config(**{**settings, **changes}), folder, seed)


def save(model_class: Any, config: Any, folder: Path, seed: int) -> Path:
    """Random weights for ``config`` in bfloat16, as safetensors, in ``folder``."""
    torch.manual_seed(seed)
    model = model_class(config).to(torch.bfloat16)
    for parameter in model.parameters():
        # Wide enough that different weights give different tokens.
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else parameter.data.add_(
            torch.randn_like(parameter) * 0.1
        )
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def without_weights(source: Path, folder: Path) -> Path:
    """A copy of the model folder that has everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in {".json", ".txt", ".jinja"} and "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    json.loads((folder / "config.json").read_text())
    return folder
