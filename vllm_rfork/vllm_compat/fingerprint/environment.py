"""Environment variables that shape weights, and those that are ignored, with the reason.

Names are shell patterns. In the runtime layout a variable of vLLM's that matches no pattern counts as well: a kernel of
the next version may depend on it, and a fork that does not happen is better than a wrong one. So ignored variables are
named as exactly as possible; a wide pattern would include names that nobody has read.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping
from typing import Literal

#: Variables of vLLM and its platform plugins.
PREFIXES = ("VLLM_", "VLLM_ASCEND_")

#: Structure, sharding, and what loading makes of the checkpoint.
BOTH_LAYOUTS = (
    "VLLM_PP_LAYER_PARTITION",
    "VLLM_MLA_DISABLE",
    "VLLM_REPLICATE_EMBED",
    "VLLM_DCP_Q_REPLICATE",
    "VLLM_*_SHARD_SP_SHARED_EXPERT",
    "VLLM_PLE_CPU_OFFLOAD",
    "VLLM_*_ONLINE_QUANT",
    "VLLM_HUMMING_*_QUANT_CONFIG",
    "VLLM_MXFP[48]_EMULATION_DEQUANT_AT_LOAD",
    "VLLM_ROCM_*FUS*_SHARED_EXPERTS",
    "VLLM_DISABLE_DSV4_MEGAMOE_SHARED_EXPERT_FUSION",
    "VLLM_USE_HW_AGNOSTIC",
    "VLLM_USE_MODELSCOPE",
    "VLLM_TEST_FORCE_LOAD_FORMAT",
    # Scales of caches if the checkpoint has none; read by vLLM before 0.20.
    "[KQV]_SCALE_CONSTANT",
    # vLLM-Ascend: which rank has which part of a matrix.
    "VLLM_ASCEND_FLASHCOMM2_PARALLEL_SIZE",
    "VLLM_ASCEND_ENABLE_FLASHCOMM*",
    "DYNAMIC_EPLB",
    "EXPERT_MAP_RECORD",
)

#: Kernels, and so padding, order, packing and derived tensors.
RUNTIME_ONLY = (
    "VLLM_ROCM_FP8_PADDING",
    "VLLM_ROCM_MOE_PADDING",
    "VLLM_ROCM_USE_*",
    "VLLM_ROCM_AITER_*",
    "VLLM_ROCM_MONO_DECODE",
    "VLLM_ROCM_MUSE_*",
    "VLLM_ROCM_CUSTOM_PAGED_ATTN",
    "VLLM_*MARLIN*",
    "VLLM_NVFP4_GEMM_BACKEND",
    "VLLM_USE_NVFP4_CT_EMULATIONS",
    "VLLM_USE_FBGEMM",
    "VLLM_HUMMING_*",
    "VLLM_USE_DEEP_GEMM*",
    "VLLM_MOE_*",
    "VLLM_USE_FUSED_MOE_*",
    "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE",
    "VLLM_*FLASHINFER_MOE*",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER",
    "VLLM_HAS_FLASHINFER_CUBIN",
    "VLLM_B12X_*",
    "VLLM_DEEPEPLL_NVFP4_DISPATCH",
    "VLLM_USE_TRITON_AWQ",
    "VLLM_TRITON_*USE_TD",
    "VLLM_DISABLED_KERNELS",
    "VLLM_USE_OINK_OPS",
    "VLLM_ENABLE_HPC_OPS",
    "VLLM_ENABLE_GEMM_RS",
    "VLLM_KIMI_K3_*",
    "VLLM_GDN_DECODE_KERNEL",
    "VLLM_ENABLE_FLA_*",
    "VLLM_BATCH_INVARIANT",
    "VLLM_FLOAT32_MATMUL_PRECISION",
    "VLLM_USE_DIRECT_DCP_*",
    "VLLM_CPU_INT4_W4A8",
    "VLLM_CPU_MOE_PREPACK",
    "VLLM_CPU_SGL_KERNEL",
    "VLLM_ZENTORCH_WEIGHT_PREPACK",
    "VLLM_XPU_FORCE_N_CONTIG_WEIGHT",
    "VLLM_XPU_INC_WNA16_BACKEND",
    "VLLM_WEIGHT_OFFLOADING_DISABLE_*",
    "VLLM_TARGET_DEVICE",
    "VLLM_SSM_CONV_STATE_LAYOUT",
    # vLLM-Ascend: the private format, what MLAPO packs, and fused kernels that need their own order.
    "VLLM_ASCEND_ENABLE_NZ",
    "VLLM_ASCEND_ENABLE_MLAPO",
    "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE",
    "VLLM_ASCEND_ENABLE_FUSED_MC2",
    "VLLM_ASCEND_ENABLE_CONTEXT_PARALLEL",
)

#: Reason → patterns.
IGNORED: Mapping[str, tuple[str, ...]] = {
    "secrets, and this project's own options": ("*_API_KEY", "*SECRET*", "*PASSWORD*", "*TOKEN", "RFORK_*"),
    "addresses, ports and names of one process or host": (
        "VLLM_HOST_IP",
        "VLLM_LOOPBACK_IP",
        "VLLM_PORT",
        "VLLM_*_PORT",
        "VLLM_*_SIDE_CHANNEL_HOST",
        "VLLM_DP_MASTER_IP",
        "VLLM_RPC_BASE_PATH",
        "VLLM_DP_RANK",
        "VLLM_DP_RANK_LOCAL",
        "VLLM_DP_SIZE",
        "VLLM_PROCESS_NAME_PREFIX",
        "VLLM_DIST_IDENT",
        "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
        "VLLM_GPU_NIC_PCIE_MAPPING",
        "VLLM_NIC_SELECTION_VARS",
        "VLLM_RAY_*",
    ),
    "where files lie": (
        "VLLM_CUDART_SO_PATH",
        "VLLM_CUDA_COMPATIBILITY_PATH",
        "VLLM_MODEL_REDIRECT_PATH",
        "VLLM_RUST_FRONTEND_PATH",
        "VLLM_CACHE_ROOT",
        "VLLM_CONFIG_ROOT",
        "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR",
        "VLLM_ASSETS_CACHE",
        "VLLM_ASSETS_CACHE_MODEL_CLEAN",
        "VLLM_TUNED_CONFIG_FOLDER",
        "VLLM_CI_USE_S3",
        "VLLM_LORA_RESOLVER_*",
    ),
    "how vLLM was built": (
        "VLLM_BUILD_*",
        "VLLM_DOCKER_BUILD_CONTEXT",
        "VLLM_IMAGE_TAG",
        "VLLM_MAIN_CUDA_VERSION",
        "VLLM_USE_PRECOMPILED*",
        "VLLM_SKIP_VERSION_SUFFIX",
        "VLLM_SKIP_PRECOMPILED_VERSION_SUFFIX",
        "VLLM_PRECOMPILED_*",
        "VLLM_VERSION",
    ),
    "the front end: requests, media, text": (
        "VLLM_MEDIA_*",
        "VLLM_MAX_AUDIO_*",
        "VLLM_MAX_EMBED_DECODE_BYTES",
        "VLLM_MAX_IMAGE_PIXELS",
        "VLLM_MAX_MEDIA_*",
        "VLLM_MM_HASHER_ALGORITHM",
        "VLLM_BEAM_ALWAYS_CONSTRAIN_OUTPUT",
        "VLLM_CHAT_TEMPLATE_FUEL",
        "VLLM_HTTP_MAX_REQUEST_BODY_SIZE",
        "VLLM_MAX_N_SEQUENCES",
        "VLLM_MAX_COMPLETION_PROMPTS",
        "VLLM_MAX_STOP_STRINGS",
        "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS",
        "VLLM_MAX_NUM_BAD_WORDS",
        "VLLM_VIDEO_LOADER_BACKEND",
        "VLLM_TOOL_JSON_ERROR_AUTOMATIC_RETRY",
        "VLLM_XGRAMMAR_CACHE_MB",
        "VLLM_V1_USE_OUTLINES_CACHE",
        "VLLM_ENFORCE_STRICT_TOOL_CALLING",
        "VLLM_ENABLE_RESPONSES_API_STORE",
        "VLLM_ENABLE_COHERE_API",
        "VLLM_GPT_OSS_HARMONY_SYSTEM_INSTRUCTIONS",
        "VLLM_GPT_OSS_SYSTEM_TOOL_MCP_LABELS",
        "VLLM_SYSTEM_START_DATE",
        "VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT",
        "VLLM_USE_FASTOKENS",
        "VLLM_USE_RUST_*",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_SKIP_MODEL_NAME_VALIDATION",
        "VLLM_SERVER_DEV_MODE",
    ),
    "counts as the plugins that it selects": ("VLLM_PLUGINS",),
    "logs, usage statistics, debugging": (
        "VLLM_NO_USAGE_STATS",
        "VLLM_USAGE_*",
        "VLLM_DO_NOT_TRACK",
        "VLLM_LOG_*",
        "VLLM_LOGGING_*",
        "VLLM_CONFIGURE_LOGGING",
        "VLLM_DISABLE_LOG_LOGO",
        "VLLM_REQUEST_BODY_LOG_LEVEL",
        "VLLM_TRACE_FUNCTION",
        "VLLM_DEBUG_DUMP_PATH",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
        "VLLM_DEBUG_MFU_METRICS",
        "VLLM_DEBUG_WORKSPACE",
        "VLLM_GC_DEBUG",
        "VLLM_PATTERN_MATCH_DEBUG",
        "VLLM_CUSTOM_SCOPES_FOR_PROFILING",
        "VLLM_NVTX_SCOPES_FOR_PROFILING",
        "VLLM_COMPUTE_NANS_IN_LOGITS",
        "VLLM_GPU_SYNC_CHECK",
        "VLLM_RANDOMIZE_DP_DUMMY_INPUTS",
        "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES",
    ),
    "processes, queues, time limits": (
        "VLLM_*_TIMEOUT",
        "VLLM_*_TIMEOUT_S",
        "VLLM_*_TIMEOUT_SECONDS",
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
        "VLLM_WORKER_MULTIPROC_METHOD",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE",
        "VLLM_RINGBUFFER_WARNING_INTERVAL",
        "VLLM_MQ_*",
        "VLLM_MSGPACK_ZERO_COPY_THRESHOLD",
        "VLLM_ALLOW_INSECURE_SERIALIZATION",
        "VLLM_USE_RAY_*",
        "VLLM_USE_SPINLOOP_EXT",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_CPU_NUM_OF_RESERVED_CPU",
        "VLLM_CPU_CI_ENV",
        "VLLM_CPU_SIM_MULTI_NUMA",
        "VLLM_TPU_BUCKET_PADDING_GAP",
        "VLLM_TPU_MOST_MODEL_LEN",
        "VLLM_TPU_USING_PATHWAYS",
        "VLLM_SLEEP_WHEN_IDLE",
        "VLLM_USE_V2_MODEL_RUNNER",
        "VLLM_ELASTIC_EP_*",
        "VLLM_FASTSAFETENSORS_QUEUE_SIZE",
        "MSMONITOR_USE_DAEMON",
    ),
    "communication": (
        "VLLM_NCCL_INCLUDE_PATH",
        "VLLM_NCCL_SO_PATH",
        "VLLM_DISABLE_PYNCCL",
        "VLLM_USE_NCCL_SYMM_MEM",
        "VLLM_ALLREDUCE_*",
        "VLLM_CUSTOM_ALLREDUCE_*",
        "VLLM_FLASHINFER_ALLREDUCE_*",
        "VLLM_NIXL_EP_MAX_NUM_RANKS",
        "VLLM_ROCM_QUICK_REDUCE_*",
        "VLLM_ROCM_USE_AITER_CUSTOM_AR",
        "VLLM_SKIP_P2P_CHECK",
        "VLLM_DISTRIBUTED_USE_SPLIT_GROUP",
        "VLLM_DEEPEP_BUFFER_SIZE_MB",
        "VLLM_DEEPEP_HIGH_THROUGHPUT_FORCE_INTRA_NODE",
        "VLLM_DEEPEP_LOW_LATENCY_USE_MNNVL",
        "VLLM_DEEPEP_V2_ALLOW_HYBRID_MODE",
        "VLLM_DEEPEP_V2_ALLOW_MULTIPLE_REDUCTION",
        "VLLM_DEEPEP_V2_PREFER_OVERLAP",
        "VLLM_DBO_COMM_SMS",
        "VLLM_XPU_PP_MICROBATCH",
        "HCCL_SO_PATH",
    ),
    "caches and the memory for them": (
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_KV_CACHE_LAYOUT",
        "VLLM_KV_OFFLOAD_MAX_BATCH_DESCRIPTORS",
        "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT",
        "VLLM_ROCM_FP8_MFMA_PAGE_ATTN",
        "VLLM_ROCM_SLEEP_MEM_CHUNK_SIZE",
        "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE",
        "VLLM_MOONCAKE_*",
        "VLLM_MORIIO_*",
        "VLLM_PREFIX_CACHE_RETENTION_INTERVAL",
        "VLLM_P2P_MAX_PEERS",
        "VLLM_USE_SIMPLE_KV_OFFLOAD",
        "VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS",
        "VLLM_ENABLE_STARTUP_PLAN",
        "VLLM_WSL2_ENABLE_PIN_MEMORY",
        "VLLM_ASCEND_FUSION_OP_TRANSPOSE_KV_CACHE_BY_BLOCK",
        "VLLM_ASCEND_ENABLE_BATCH_MEMCPY",
    ),
    "compilation, graphs, warm-up, scheduling: how the same weights are used": (
        "VLLM_USE_AOT_COMPILE",
        "VLLM_USE_MEGA_AOT_ARTIFACT",
        "VLLM_FORCE_AOT_LOAD",
        "VLLM_USE_BYTECODE_HOOK",
        "VLLM_USE_STANDALONE_COMPILE",
        "VLLM_USE_LAYERNAME",
        "VLLM_USE_BREAKABLE_CUDAGRAPH",
        "VLLM_ENABLE_PREGRAD_PASSES",
        "VLLM_ENABLE_CUDAGRAPH_GC",
        "VLLM_ENABLE_INDUCTOR_*",
        "VLLM_DISABLE_COMPILE_CACHE",
        "VLLM_COMPILE_CACHE_SAVE_FORMAT",
        "VLLM_XLA_CACHE_PATH",
        "VLLM_XLA_CHECK_RECOMPILATION",
        "VLLM_XLA_USE_SPMD",
        "VLLM_ENABLE_CUDA_COMPATIBILITY",
        "VLLM_XPU_ENABLE_XPU_GRAPH",
        "VLLM_ENABLE_FUSED_MOE_ACTIVATION_CHUNKING",
        "VLLM_ENABLE_MOE_DP_CHUNK",
        "VLLM_FUSED_MOE_CHUNK_SIZE",
        "VLLM_DEEP_GEMM_WARMUP",
        "VLLM_TRITON_JIT_WARMUP_NUM_THREADS",
        "VLLM_TRITON_FORCE_FIRST_CONFIG",
        "VLLM_FLASHINFER_AUTOTUNE_SKIP_OPS",
        "VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE",
        "VLLM_SPARSE_INDEXER_MAX_LOGITS_MB",
        "VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN",
        "VLLM_CPU_ATTN_SPLIT_KV",
        "VLLM_DISABLE_SHARED_EXPERTS_STREAM",
        "VLLM_COHERE2_ATTN_MOE_DUAL_STREAM_TOKEN_THRESHOLD",
        "VLLM_MULTI_STREAM_GEMM_TOKEN_THRESHOLD",
        "VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD",
        "VLLM_LORA_DISABLE_PDL",
        "VLLM_LORA_ENABLE_DUAL_STREAM",
        "VLLM_USE_FLASHINFER_SAMPLER",
        "VLLM_XPU_USE_SAMPLER_KERNEL",
        "VLLM_RAISE_ON_LOGIT_NANS",
        "VLLM_ASCEND_BALANCE_SCHEDULING",
    ),
}


def place_of(name: str) -> Literal["both layouts", "runtime only", "ignored", "unknown"]:
    """The table with a pattern for ``name``; the wider patterns of ``RUNTIME_ONLY`` are tried last."""
    if _in(name, BOTH_LAYOUTS):
        return "both layouts"
    if any(_in(name, patterns) for patterns in IGNORED.values()):
        return "ignored"
    return "runtime only" if _in(name, RUNTIME_ONLY) else "unknown"


def shaping_environment(environ: Mapping[str, str], *, runtime: bool) -> dict[str, str]:
    """The variables in ``environ`` that count, with their values.

    A variable with its default value differs from one that is not set. That is a needless mismatch, which costs a
    fork; a value that was interpreted wrongly would cost a model.
    """
    return {name: value for name, value in environ.items() if _counts(name, runtime=runtime)}


def _counts(name: str, *, runtime: bool) -> bool:
    place = place_of(name)
    if place == "unknown":
        return runtime and name.startswith(PREFIXES)
    return place == "both layouts" or (runtime and place == "runtime only")


def _in(name: str, patterns: tuple[str, ...]) -> bool:
    return _one_of(patterns).match(name) is not None


@functools.cache
def _one_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(fnmatch.translate, patterns)))
