"""Convert a saved model's linear weights into the formats of quantized checkpoints, file by file.

Real quantization of the random weights, so that scales and packed values are what kernels expect; nothing here aims
at accuracy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: The linear layers of decoder blocks, in most architectures' names; embeddings, routers and heads stay as they are.
LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight$")
#: Input features that share one scale, for GPTQ and AWQ.
GROUP = 32
#: Side of the squares that share one scale in DeepSeek's FP8.
BLOCK = 128
#: The order in which AWQ puts eight values into one 32-bit word.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: Largest number of float8_e4m3fn.
FP8_MAX = 448.0

Tensors = dict[str, Any]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors of each safetensors file in ``folder`` by the result of ``change``."""
    from safetensors.torch import load_file, save_file

    from zoo.checkpoints import maker_device

    placed: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        changed = {name: tensor.contiguous() for name, tensor in change(load_file(path, device=maker_device())).items()}
        save_file(changed, path, metadata={"format": "pt"})
        placed.update(dict.fromkeys(changed, path.name))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": placed}), encoding="utf-8")


def _each_linear(folder: Path, change: Callable[[str, Any], Tensors]) -> None:
    """Replace each linear layer's weight, of shape [out, in], by the result of ``change(prefix, weight)``."""

    def all_of(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            if LINEAR.search(name) and tensor.dim() == 2:
                found.update(change(name.removesuffix(".weight"), tensor.float()))
            else:
                found[name] = tensor
        return found

    rewrite(folder, all_of)


def int8(folder: Path) -> dict[str, Any]:
    """compressed-tensors W8A8: a scale per output channel, activations scaled per token while running."""
    import torch

    def change(prefix: str, weight: Any) -> Tensors:
        scale = weight.abs().amax(1, keepdim=True) / 127
        values = (weight / scale).round().to(torch.int8)
        return {f"{prefix}.weight": values, f"{prefix}.weight_scale": scale.to(torch.bfloat16)}

    _each_linear(folder, change)
    return _compressed("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True})


def _four_bits(weight: Any) -> tuple[Any, Any]:
    """Values 0 to 15 of shape [in, out] about 8, and scales of shape [in / GROUP, out]."""
    features, out = weight.shape[1], weight.shape[0]
    grouped = weight.t().reshape(features // GROUP, GROUP, out)
    scales = grouped.abs().amax(1) / 7
    values = (grouped / scales[:, None]).round().clamp(-8, 7) + 8
    return values.reshape(features, out).int(), scales


def _pack(values: Any, order: tuple[int, ...]) -> Any:
    """Eight neighbours of the last dimension in one 32-bit word each."""
    import torch

    eights = values.reshape(*values.shape[:-1], -1, 8).to(torch.int64)
    word = sum(eights[..., source] << (4 * place) for place, source in enumerate(order))
    word = torch.as_tensor(word)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def gptq(folder: Path) -> dict[str, Any]:
    """GPTQ with four bits: packed along the input features."""
    import torch

    def change(prefix: str, weight: Any) -> Tensors:
        values, scales = _four_bits(weight)
        groups, out = scales.shape
        natural = tuple(range(8))
        zeros = torch.full((groups, out), 7)  # zero points are stored less one
        return {
            f"{prefix}.qweight": _pack(values.t(), natural).t(),
            f"{prefix}.qzeros": _pack(zeros, natural),
            f"{prefix}.scales": scales.to(torch.bfloat16),
            f"{prefix}.g_idx": torch.arange(values.shape[0], dtype=torch.int32, device=weight.device) // GROUP,
        }

    _each_linear(folder, change)
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}


def awq(folder: Path) -> dict[str, Any]:
    """AWQ with four bits: packed along the output features, in AWQ's order."""
    import torch

    def change(prefix: str, weight: Any) -> Tensors:
        values, scales = _four_bits(weight)
        return {
            f"{prefix}.qweight": _pack(values, AWQ_ORDER),
            f"{prefix}.qzeros": _pack(torch.full(tuple(scales.shape), 8), AWQ_ORDER),
            f"{prefix}.scales": scales.to(torch.bfloat16),
        }

    _each_linear(folder, change)
    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def fp8(folder: Path) -> dict[str, Any]:
    """FP8 with one scale per tensor, for weights and for activations."""
    import torch

    def change(prefix: str, weight: Any) -> Tensors:
        scale = weight.abs().max() / FP8_MAX
        return {
            f"{prefix}.weight": (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn),
            f"{prefix}.weight_scale": scale.reshape(1),
            f"{prefix}.input_scale": torch.tensor([0.05]),
        }

    _each_linear(folder, change)
    return {"quant_method": "fp8", "activation_scheme": "static"}


def fp8_channels(folder: Path) -> dict[str, Any]:
    """compressed-tensors FP8: a scale per output channel, activations scaled per token while running."""
    import torch

    def change(prefix: str, weight: Any) -> Tensors:
        scale = weight.abs().amax(1, keepdim=True) / FP8_MAX
        values = (weight / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        return {f"{prefix}.weight": values, f"{prefix}.weight_scale": scale.to(torch.bfloat16)}

    _each_linear(folder, change)
    plain = {"num_bits": 8, "type": "float", "symmetric": True}
    return _compressed("float-quantized", plain)


def _compressed(form: str, plain: dict[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**plain, "strategy": "channel", "dynamic": False},
                "input_activations": {**plain, "strategy": "token", "dynamic": True},
            }
        },
    }


def fp8_blocks(folder: Path) -> dict[str, Any]:
    """DeepSeek's FP8: a scale per square of BLOCK by BLOCK weights, activations scaled while running."""
    import torch

    def change(prefix: str, weight: Any) -> Tensors:
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        padded = torch.zeros(rows * BLOCK, columns * BLOCK, device=weight.device)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        squares = padded.reshape(rows, BLOCK, columns, BLOCK)
        scale = squares.abs().amax((1, 3)).clamp(min=1e-6) / FP8_MAX
        values = (squares / scale[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
        return {
            f"{prefix}.weight": values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn),
            f"{prefix}.weight_scale_inv": scale,
        }

    _each_linear(folder, change)
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


FORMATS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "int8": int8,
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "fp8-blocks": fp8_blocks,
    "fp8-channels": fp8_channels,
}
