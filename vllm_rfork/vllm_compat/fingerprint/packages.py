"""Installed packages that shape weights, and those that do not, with the reason; see ``config_fields.py``.

vLLM asks whether a module is there and chooses by it, so these are names of modules, not of distributions. Every module
that its models, layers, kernels, platforms and attention backends look for has its place here; a test compares the
lists with the installed vLLM's source.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Both layouts: their code is part of models, or makes weights of what storage holds.
ALWAYS = (
    "transformers",
    "timm",
    "terratorch",
    "compressed_tensors",
    "torchao",
    "bitsandbytes",
    "gguf",
)

#: The runtime layout: they bring kernels, and kernels want weights in their own order.
IN_RUNTIME = (
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

#: Why → modules.
LEFT_OUT: Mapping[str, tuple[str, ...]] = {
    "counts by its own version": ("torch",),
    "the device's type and generation count": ("amdsmi", "cuda", "libtpu", "nvidia", "tpu_inference"),
    "reads storage; the bytes are the checkpoint's": (
        "fastsafetensors",
        "filelock",
        "huggingface_hub",
        "instanttensor",
        "modelscope",
        "runai_model_streamer",
        "safetensors",
        "tensorizer",
    ),
    "turns text and media into input": (
        "PIL",
        "mistral_common",
        "tokenizers",
        "torchaudio",
        "torchcodec",
        "torchvision",
    ),
    "arithmetic and reshaping that vLLM writes out, and helpers of the host": (
        "cachetools",
        "cbor2",
        "cloudpickle",
        "einops",
        "numpy",
        "packaging",
        "psutil",
        "pybase64",
        "regex",
        "requests",
        "setproctitle",
        "tqdm",
        "typing_extensions",
        "urllib3",
        "xxhash",
        "yaml",
    ),
    "makes drafts without a model": ("arctic_inference", "numba"),
    "starts processes, and lets them talk": ("ray", "zmq"),
}

#: Distributions that bring a module, where none has its name.
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
