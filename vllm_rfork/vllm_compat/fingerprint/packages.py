"""Installed packages that shape weights.

vLLM checks whether a module exists and chooses by it, so these are names of modules, not of distributions. Every other
module that its models, layers, kernels, platforms and attention backends look for is in ``ignored.json``, with the
reason; a test compares both with the installed vLLM's source.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Their code is part of models, or makes weights of what is in storage.
BOTH_LAYOUTS = (
    "transformers",
    "timm",
    "terratorch",
    "compressed_tensors",
    "torchao",
    "bitsandbytes",
    "gguf",
)

#: They contain kernels, which need weights in their own order.
RUNTIME_ONLY = (
    "aiter",
    "auto_round_kernel",
    "b12x",
    "conch",
    "cutlass",
    "deep_ep",
    "deep_gemm",
    "fbgemm_gpu",
    "flag_gems",
    "flash_attn",
    "flash_attn_npu_v3",
    "flashinfer",
    "flashinfer_cubin",
    "flydsl",
    "helion",
    "hpc",
    "humming",
    "moonep",
    "mori",
    "nixl_ep",
    "quack",
    "quark",
    "tilelang",
    "tokenspeed_mla",
    "torch_npu",
    "triton",
    "triton_kernels",
    "vllm_xpu_kernels",
    "xielu",
    "zentorch",
)

#: Distributions that contain a module, if their name is not the module's.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "aiter": ("amd-aiter",),
    "conch": ("conch-triton-kernels",),
    "cutlass": ("nvidia-cutlass-dsl",),
    "fbgemm_gpu": ("fbgemm-gpu", "fbgemm-gpu-genai"),
    "flashinfer": ("flashinfer-python",),
    "quack": ("quack-kernels",),
    "quark": ("amd-quark",),
    "triton": ("triton", "triton-ascend", "triton-xpu", "pytorch-triton", "pytorch-triton-rocm"),
}
