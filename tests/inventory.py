"""Reading and writing models under vLLM's rules; each call traverses the model anew."""

from __future__ import annotations

import functools

import torch
from torch import nn

from vllm_rfork.model import restore, tensors
from vllm_rfork.model.coverage import TensorSize, tensor_sizes
from vllm_rfork.model.python_state import state_in
from vllm_rfork.model.tensors import TensorInventory
from vllm_rfork.model.traversal import walk
from vllm_rfork.model.value_codec import Plain
from vllm_rfork.vllm_compat.model_rules import VLLM_RULES


def collect(model: nn.Module, device: torch.device) -> TensorInventory:
    """Every tensor of ``model`` as it stands."""
    return tensors.collect(walk(model, VLLM_RULES), device)


def state_of(model: nn.Module) -> dict[str, Plain]:
    """Every plain value reachable from ``model``, by name."""
    return state_in(walk(model, VLLM_RULES))


def sizes_of(model: nn.Module) -> dict[str, TensorSize]:
    """The size of every tensor of ``model``, by name."""
    return tensor_sizes(walk(model, VLLM_RULES))


apply_state = functools.partial(restore.apply_state, rules=VLLM_RULES)
match_state = functools.partial(restore.match_state, rules=VLLM_RULES)
