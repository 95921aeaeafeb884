"""Dummy weights: what vLLM post-processes so that a fork finds the structure of the seed's model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vllm_rfork.vllm_compat import eligibility
from vllm_rfork.vllm_compat.storage_loader import storage_loader

#: The range of vLLM's own dummies, and the seed of each tensor's.
_LOW, _HIGH, _SEED = -1e-3, 1e-3, 1234


def fill_with_dummies(model: nn.Module, model_config: Any, load_config: Any) -> None:
    """Fill ``model`` as ``--load-format dummy`` does, so that every quantization method can post-process it.

    Integers become 0; vLLM's own dummies leave them as they are in memory. Group indices and packed weights are used
    as indices. Each tensor is filled once; vLLM 0.26 fills it once for each module that contains it.
    """
    for parameter in model.parameters():  # construction has filled the buffers already
        if not (parameter.is_meta or parameter.is_floating_point() or parameter.is_complex()):
            parameter.data.zero_()
    if eligibility.quantizes_online(model):
        # Then dummies are made and quantized layer by layer.
        storage_loader(load_config, "dummy", {}).load_weights(model, model_config)
        return
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and not tensor.is_meta:
            _fill(tensor)


def _fill(tensor: torch.Tensor) -> None:
    """Fill ``tensor`` with small numbers that depend on its size and type only."""
    generator = torch.Generator(device=tensor.device)
    generator.manual_seed(_SEED)
    if tensor.dtype.itemsize < 2:  # no random numbers are made in 8 bits
        wide = torch.empty_like(tensor, dtype=torch.float16)
        tensor.copy_(wide.uniform_(_LOW, _HIGH, generator=generator))
    else:
        tensor.uniform_(_LOW, _HIGH, generator=generator)


def tie_dummies(model: nn.Module, span_of: Mapping[str, int]) -> None:
    """Make output head and input embeddings equal or different, as they are on the seed.

    From 0.29 on, post-processing compares the two by value and lets them share memory if they are equal. Dummy weights
    of one shape always are.

    Args:
        span_of: the span in which the seed has each tensor, by name; tensors in one span share memory.
    """
    names = _head_and_embedding(model)
    if names is None:
        return
    head_name, embedding_name = names
    head, embedding = model.get_submodule(head_name).weight, model.get_submodule(embedding_name).weight
    if head.is_meta or embedding.is_meta or head.dtype.itemsize < 2:  # quantized ones are not compared
        return
    if head.data_ptr() != embedding.data_ptr() and head.shape == embedding.shape:
        head.data.copy_(embedding.data)
        # Where both are one module on the seed, the head has no name of its own there.
        if span_of.get(f"{head_name}.weight") not in (None, span_of.get(f"{embedding_name}.weight")):
            head.data.add_(1.0)


def _head_and_embedding(model: nn.Module) -> tuple[str, str] | None:
    """Names of the output head and the input embedding, as vLLM looks for them; None unless there is one of each."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, VocabParallelEmbedding)]
    plain = [(name, module) for name, module in found if isinstance(getattr(module, "weight", None), torch.Tensor)]
    heads = [name for name, module in plain if isinstance(module, ParallelLMHead)]
    embeddings = [name for name, module in plain if not isinstance(module, ParallelLMHead)]
    return (heads[0], embeddings[0]) if len(heads) == len(embeddings) == 1 else None
