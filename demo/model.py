"""The demo's models: random weights in a real architecture, and a tokenizer with the same vocabulary.

The tokenizer is trained on invented text, so that nothing is downloaded. Its size determines the vocabulary: with a
larger one, some tokens would have no text, and empty answers are all equal.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END = "<|endoftext|>"
#: Increase it when anything below changes the files; folders of another recipe are made again.
RECIPE = "1"

#: About 380 MB in bfloat16: large enough for a rate to mean something, small enough for two servers on a laptop.
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Invented sentences over a few thousand invented words; the same ones for the same arguments."""
    dice = random.Random(seed)  # noqa: S311 - text to train on, not a secret
    onsets = ["b", "br", "d", "dr", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z"]
    rhymes = ["a", "al", "an", "ar", "e", "el", "en", "er", "i", "il", "in", "is", "o", "ol", "on", "or", "u", "um"]
    words = ["".join(dice.choice(onsets) + dice.choice(rhymes) for _ in range(dice.randint(1, 3))) for _ in range(6000)]
    return [" ".join(dice.choices(words, k=dice.randint(5, 14))).capitalize() + "." for _ in range(count)]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCABULARY tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(20_000), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def build_model(folder: Path, seed: int) -> None:
    """Write a model with the weights of ``seed`` into ``folder``, unless this recipe's model is there already.

    The marker is written last, so that a build that was interrupted is made again.
    """
    marker = folder / "demo-recipe.json"
    recipe = json.dumps({"recipe": RECIPE, "seed": seed, "vocabulary": VOCABULARY, **SHAPE}, sort_keys=True)
    if marker.exists() and marker.read_text(encoding="utf-8") == recipe:
        return
    # imported here: the rest of the demo starts without torch
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer()
    end = tokenizer.convert_tokens_to_ids(END)
    config = Qwen2Config(
        vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, pad_token_id=end, dtype="bfloat16", **SHAPE
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    # Freshly initialised weights hardly depend on their input: every prompt would get nearly the same answer.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    marker.write_text(recipe, encoding="utf-8")


def copy_without_weights(source: Path, folder: Path) -> None:
    """A copy of a model folder with everything but the weight files: configuration and tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "*.bin"))


def weight_files(folder: Path) -> list[str]:
    """The names of the weight files in a model folder."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in {".safetensors", ".bin", ".pt"})
