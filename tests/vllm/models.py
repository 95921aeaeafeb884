"""Tiny checkpoints of real architectures with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zoo.checkpoints import save, without_weights

__all__ = ["WEIGHTS_A", "WEIGHTS_B", "qwen2", "save", "without_weights"]

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
