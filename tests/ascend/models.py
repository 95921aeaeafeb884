"""Small modules of the shapes that vLLM-Ascend's layers have, as read in its releases 0.18 and 0.23.

Each does with its tensors what the named class does in ``process_weights_after_loading``: it replaces, transposes,
empties, derives and stamps. The arithmetic is kept so small that the outcome can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from tests.ascend.fake_torch_npu import FakeTorchNpu, Format

NAN = float("nan")


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


def dispose_layer(layer: nn.Module) -> None:
    """``vllm_ascend.utils.dispose_layer``: every tensor of ``layer`` keeps its name and loses its memory."""
    for name in dir(layer):
        value = getattr(layer, name)
        if isinstance(value, torch.Tensor):
            value.set_(torch.empty((0,), dtype=value.dtype))  # type: ignore[call-overload]


class Linear(nn.Module):
    """A linear layer with a quantization method; ``process`` is what the method does after loading."""

    def __init__(self, rows: int, columns: int, process: Callable[[Linear], None] | None = None, **extra: Any) -> None:
        super().__init__()
        self.weight = parameter(rows, columns)
        for name, shape in extra.items():
            self.register_parameter(name, parameter(*shape))
        self.quant_method = SimpleNamespace(process_weights_after_loading=process or (lambda layer: None))


def w8a8_static(layer: Linear) -> None:
    """``quantization/methods/w8a8_static.py: AscendW8A8LinearMethod``."""
    expanding = layer.weight.data.shape[1]
    layer.aclnn_input_scale = nn.Parameter(layer.input_scale.data.repeat(expanding), requires_grad=False)
    layer.aclnn_input_scale_reciprocal = 1 / nn.Parameter(layer.input_scale.data.repeat(expanding), requires_grad=False)
    layer.aclnn_input_offset = nn.Parameter(layer.input_offset.data.repeat(expanding), requires_grad=False).to(
        layer.aclnn_input_scale.dtype
    )
    layer.weight.data = layer.weight.data.transpose(0, 1).contiguous()
    layer.weight_scale.data = torch.flatten(layer.weight_scale.data)


def w8a8_dynamic(layer: Linear) -> None:
    """``quantization/methods/w8a8_dynamic.py: AscendW8A8DynamicLinearMethod``, with the chunks that DSA-CP makes."""
    layer.weight.data = layer.weight.data.transpose(0, 1).contiguous()
    half = layer.weight.shape[1] // 2
    layer._chunk_size = half
    layer.weight_1 = layer.weight.data[:, :half].contiguous()
    layer.weight_2 = layer.weight.data[:, half:].contiguous()
    layer.weight_1_scale_fp32 = layer.weight_scale.data[:half].flatten().contiguous().to(torch.float32)
    layer.weight_2_scale_fp32 = layer.weight_scale.data[half:].flatten().contiguous().to(torch.float32)
    del layer.weight
    del layer.weight_scale


def flatquant(layer: Linear) -> None:
    """``quantization/methods/w4a4_flatquant.py``: a Python number is derived from a weight."""
    layer.register_parameter("weight_packed", nn.Parameter(layer.weight.data.to(torch.int32), requires_grad=False))
    del layer.weight
    layer.left_trans = nn.Parameter(layer.left_trans.data.t().contiguous())
    layer.clip_ratio = nn.Parameter(layer.clip_ratio.data.to(torch.float32))
    layer.aclnn_clip_ratio = layer.clip_ratio.item()


def mxfp8(layer: Linear) -> None:
    """``quantization/methods/w8a8_mxfp8.py``: flags and shapes stand beside the weights."""
    if getattr(layer, "_mxfp8_transformed", False):
        return
    if not hasattr(layer, "_mxfp8_original_shapes"):
        layer._mxfp8_original_shapes = {
            "weight": tuple(layer.weight.data.shape),
            "weight_scale": tuple(layer.weight_scale.data.shape),
        }
    rows, columns = layer.weight_scale.data.shape
    layer.weight_scale.data = layer.weight_scale.data.reshape(rows, columns // 2, 2).transpose(0, 1).contiguous()
    layer.weight.data = layer.weight.data.transpose(0, 1).contiguous()
    layer._mxfp8_transformed = True


def pdmix(layer: Linear, *, is_kv_consumer: bool) -> None:
    """``quantization/methods/w8a8_pdmix.py``: the role is stamped on the layer."""
    w8a8_static(layer)
    layer.weight_scale_fp32 = layer.weight_scale.data.to(torch.float32)
    layer.is_kv_consumer = is_kv_consumer


class Experts(nn.Module):
    """``ops/fused_moe/fused_moe.py: AscendUnquantizedFusedMoEMethod``: transposed into new storage, or into lists."""

    def __init__(self, *, dynamic_eplb: bool = False) -> None:
        super().__init__()
        self.w13_weight = parameter(4, 6, 3)
        self.w2_weight = parameter(4, 3, 6)
        self.moe_load = torch.zeros(4, dtype=torch.int64)
        self.dynamic_eplb = dynamic_eplb
        self.quant_method = SimpleNamespace(process_weights_after_loading=self._process)

    @staticmethod
    def _process(layer: Experts) -> None:
        layer.w13_weight = nn.Parameter(layer.w13_weight.data.transpose(1, 2).contiguous(), requires_grad=False)
        layer.w2_weight = nn.Parameter(layer.w2_weight.data.transpose(1, 2).contiguous(), requires_grad=False)
        if layer.dynamic_eplb:
            layer.w13_weight_list = [weight.clone() for weight in layer.w13_weight.data.unbind(dim=0)]
            layer.w2_weight_list = [weight.clone() for weight in layer.w2_weight.data.unbind(dim=0)]
            del layer.w13_weight
            del layer.w2_weight


class SharedExperts(nn.Module):
    """``AscendSharedFusedMoE`` (0.18) and ``AscendMoERunner`` (0.23): post-processing is wrapped with a check."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = parameter(3, 3)
        self.checked: Any = type("Checked", (), {"times": 0})  # a class: not state of the model
        self.quant_method = SimpleNamespace(process_weights_after_loading=lambda layer: None)
        original = self.quant_method.process_weights_after_loading

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._validate_shared_expert_consistency()
            return result

        self.quant_method.process_weights_after_loading = wrapped

    def _validate_shared_expert_consistency(self) -> None:
        test_input = torch.linspace(-1, 1, 3)
        integrated, split = self.gate_up_proj @ test_input, (self.gate_up_proj * test_input).sum(1)
        if not torch.allclose(integrated, split):
            raise ValueError("shared experts split computation does not match the integrated computation.")
        self.checked.times += 1


class MlaImpl:
    """``attention/mla_v1.py: AscendMLAImpl``: what is computed with lies on a helper that is no module."""

    def __init__(self, npu: FakeTorchNpu, **modules: Any) -> None:
        self._npu = SimpleNamespace(cast=npu.npu_format_cast)
        self.kv_b_proj = modules["kv_b_proj"]
        self.fused_qkv_a_proj = modules["fused_qkv_a_proj"]
        self.q_a_layernorm = modules["q_a_layernorm"]
        self.enable_mlapo = True
        self.mlapo_possible = modules.get("mlapo_possible", False)
        self.key_cache: torch.Tensor | None = None

    def process_weights_after_loading(self) -> None:
        weight = self.kv_b_proj.weight.data.T.view(32, 2, 32)
        w_uk, w_uv = weight.split([16, 16], dim=-1)
        if not hasattr(self, "W_UV"):
            self.W_UV = w_uv.transpose(0, 1).contiguous()
            self.W_UK_T = w_uk.permute(1, 2, 0).contiguous()
        else:
            self.W_UV.copy_(w_uv.transpose(0, 1))
            self.W_UK_T.copy_(w_uk.permute(1, 2, 0))
        if not self.mlapo_possible:
            self.enable_mlapo = False
        if self.enable_mlapo:
            self.wd_qkv = self._npu.cast(self.fused_qkv_a_proj.weight.data.t().contiguous(), Format.FRACTAL_NZ)
            self.gamma1 = self.q_a_layernorm.weight.data  # an alias
            self.ctkv_scale = torch.ones(1)


class SfaImpl(MlaImpl):
    """``attention/sfa_v1.py: AscendSFAImpl``: the projections are emptied, and a matrix lies on the class."""

    q_hadamard: ClassVar[torch.Tensor | None] = None

    def __init__(self, npu: FakeTorchNpu, *, is_kv_consumer: bool = False, **modules: Any) -> None:
        super().__init__(npu, **modules)
        self.is_kv_consumer = is_kv_consumer

    def process_weights_after_loading(self) -> None:
        super().process_weights_after_loading()
        dispose_layer(self.kv_b_proj)
        if self.enable_mlapo and self.is_kv_consumer:
            self.fused_qkv_a_proj.weight = None
        if SfaImpl.q_hadamard is None:
            SfaImpl.q_hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5


class Attention(nn.Module):
    """``MLAAttention`` within its wrapper within the layer's attention, as deep as in vLLM."""

    def __init__(self, impl: type[MlaImpl], npu: FakeTorchNpu, **options: Any) -> None:
        super().__init__()
        self.kv_b_proj = Linear(64, 32)
        self.fused_qkv_a_proj = Linear(48, 40)
        self.q_a_layernorm = Linear(1, 8)
        self.mla_attn = nn.Module()
        self.mla_attn.kv_b_proj = self.kv_b_proj
        self.mla_attn.mla_attn = nn.Module()
        modules = {name: getattr(self, name) for name in ("kv_b_proj", "fused_qkv_a_proj", "q_a_layernorm")}
        self.mla_attn.mla_attn.impl = impl(npu, **modules, **options)


class Nz(nn.Module):
    """A quantized linear layer with ``weight_nz_mode`` 1: cast to NZ, then transposed as a view (310P does this)."""

    def __init__(self, npu: FakeTorchNpu) -> None:
        super().__init__()
        self.weight = parameter(40, 50, dtype=torch.int8)

        def process(layer: Nz) -> None:
            layer.weight.data = npu.npu_format_cast(layer.weight.data, Format.FRACTAL_NZ).transpose(0, 1)

        self.quant_method = SimpleNamespace(process_weights_after_loading=process)


def post_process(model: nn.Module) -> None:
    """``process_weights_after_loading``: quantization methods first, attention last."""
    modules = list(model.modules())
    for module in modules:
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    for module in modules:
        if hasattr(module, "impl"):
            module.impl.process_weights_after_loading()


def fill(model: nn.Module, *, real: bool) -> None:
    """Real weights, or what a dummy load leaves: tiny numbers, and nothing at all where a kernel divides by them."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if real:
            values = torch.randint(1, 100, weight.shape, generator=generator).to(weight.dtype)
            weight.data.copy_(values)
        elif weight.is_floating_point():
            weight.data.fill_(NAN)
