"""Give a model the small tensors and the Python-side state of the seed's: whatever a copy of memory does not carry."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vllm_rfork.errors import ForkError, VerificationError
from vllm_rfork.manifest.schema import Manifest
from vllm_rfork.model.python_state import apply_state, match_state
from vllm_rfork.model.rules import ModelRules
from vllm_rfork.model.tensors import TensorInventory, raw_bytes
from vllm_rfork.model.value_codec import Plain


def restore(
    model: nn.Module,
    tensors: TensorInventory,
    seed: Manifest,
    rules: ModelRules,
    *,
    built: dict[str, Plain] | None,
    in_time: Callable[[], None],
    settle: Callable[[], None],
) -> None:
    """Make everything of ``model`` that a fork has not copied equal to the seed's.

    Args:
        tensors: of ``model``; their spans contain the seed's bytes already.
        built: the model's plain values as built, if it has been post-processed from other bytes since.
        in_time: raises ForkError if there is no time left.
        settle: called when the state is set, for checks that wait for it.

    Raises:
        ForkError: something cannot be made equal.
        VerificationError: a small tensor does not contain the seed's bytes in the end.
    """
    apply_inline(tensors, seed)
    if built is None:
        apply_state(model, seed.state, in_time, rules=rules)
    else:
        match_state(model, built, seed.state, seed.state_gone, in_time, rules=rules)
    settle()
    check_inline(tensors, seed)


def apply_inline(inventory: TensorInventory, manifest: Manifest) -> None:
    """Copy the seed's inline bytes into this process's tensors. Pairing has compared their shapes and aliases already.

    Raises:
        ForkError: bytes are missing or of the wrong length.
    """
    for entry in manifest.tensors:
        target = inventory.inline.get(entry.name)
        if target is None:
            continue
        nbytes = target.numel() * target.element_size()
        if entry.inline is None or len(entry.inline) != nbytes:
            raise ForkError(f"the seed sent no usable bytes for tensor {entry.name}")
        source = torch.frombuffer(bytearray(entry.inline), dtype=torch.uint8).view(target.dtype).view(target.shape)
        target.copy_(source)


def check_inline(inventory: TensorInventory, manifest: Manifest) -> None:
    """Prove that inline tensors contain the seed's bytes, after everything else has been done to the model.

    Raises:
        VerificationError: names those that do not.
    """
    sent = {entry.name: entry.inline for entry in manifest.tensors}
    if wrong := [name for name, tensor in inventory.inline.items() if raw_bytes(tensor) != sent.get(name)]:
        raise VerificationError(f"{len(wrong)} small tensors do not contain the seed's bytes: {', '.join(wrong[:5])}")
