"""Models for ``bench.start_up``, with random weights: ``python -m bench.start_up_models dense|moe|fp8 FOLDER``.

``dense`` has 7.6 B parameters (15.2 GB). ``moe`` and ``fp8`` have few layers of usual widths: the kernels are what
counts. With ``--small`` they are tiny, for machines without an accelerator.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zoo.case import Case
from zoo.catalogue import HEADS_OF_32, QWEN3_MOE
from zoo.checkpoints import make

_QWEN2_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_WIDE = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
_WIDE |= {"vocab_size": 32768, "max_position_embeddings": 4096, "num_hidden_layers": 4}

CASES = {
    "dense": Case("start-up-dense", "dense", "Qwen2ForCausalLM", _QWEN2_7B),
    "moe": Case(
        "start-up-moe",
        "experts",
        "Qwen3MoeForCausalLM",
        {**QWEN3_MOE, **_WIDE, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
    "fp8": Case(
        "start-up-fp8", "FP8", "LlamaForCausalLM", {**HEADS_OF_32, **_WIDE, "intermediate_size": 8192}, finish=("fp8",)
    ),
}
SMALL = {
    "dense": Case("start-up-dense", "dense", "Qwen2ForCausalLM", HEADS_OF_32),
    "moe": Case("start-up-moe", "experts", "Qwen3MoeForCausalLM", QWEN3_MOE),
    "fp8": Case("start-up-fp8", "FP8", "LlamaForCausalLM", HEADS_OF_32, finish=("fp8",)),
}


def main() -> None:
    """Make one model, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(CASES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    make((SMALL if options.small else CASES)[options.kind], options.folder)


if __name__ == "__main__":
    main()
