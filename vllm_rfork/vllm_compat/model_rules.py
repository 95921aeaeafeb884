"""The rules for models of vLLM and vLLM-Ascend: scratch memory, placeholders, and attributes that say nothing.

Memory is scratch where forward passes write it before they read it, so that what a receiver allocated for itself is
as good as the seed's. Each entry gives its reason.
"""

from __future__ import annotations

from vllm_rfork.model.rules import ModelRules

#: By name, whichever object has the attribute.
_SCRATCH_BUFFERS = {
    "kv_cache": "bound to the KV cache after loading",
    "_kv_cache": "bound to the KV cache after loading",
    "workspace": "kernel scratch",
    "workspace_buffer": "kernel scratch",
    "_workspace_buffer": "kernel scratch",
    "_workspace_buf": "kernel scratch of MLA on Blackwell (SM100Workspace)",
    "_nvfp4_fp8_out": "FlashInfer's output before it is passed on, written in every step",
    "q_range": "a setting's number, put on the current device whenever weights are loaded or updated",
    "k_range": "a setting's number, put on the current device whenever weights are loaded or updated",
    "v_range": "a setting's number, put on the current device whenever weights are loaded or updated",
    "topk_indices_buffer": "indices of sparse attention, written in every step",
    "candidate_block_buffer": "candidates of sparse attention, written in every step",
    "sparse_table_buffers": "block tables of sparse attention, written in every step",
    "sparse_bt_buffer": "block tables of sparse attention, written in every step",
    "sparse_ctx_buffer": "lengths of sparse attention, written in every step",
    "_mtp_hidden_buffer": "hidden states that the target leaves for its draft in every step",
    "_compress_scratch": "kernel scratch",
    "deepstack_input_embeds": "features of images on their way to deeper layers, written per request",
    "_ds_buffers": "features of images on their way to deeper layers, written per request",
    "per_layer_embeddings": "embeddings of the current tokens, written in every step",
    "_prefetch_ids": "rows of an n-gram table that the next step looks up",
    "_fp8_q_amax": "a history of a vision tower's inputs",
    "_fp8_k_amax": "a history of a vision tower's inputs",
    "_fp8_v_amax": "a history of a vision tower's inputs",
    "punica_wrapper": "the adapters of the current tokens, written in every step",
    "expert_load_view": "EPLB statistics",
    "logical_to_physical_map": "EPLB bookkeeping",
    "logical_replica_count": "EPLB bookkeeping",
    "key_cache": "vLLM-Ascend binds the KV cache to attention implementations",
    "value_cache": "vLLM-Ascend binds the KV cache to attention implementations",
    "o_proj_full_pool": "vLLM-Ascend gathers into it in every step",
    "o_proj_full_gather_pool": "vLLM-Ascend gathers into it in every step",
    "moe_load": "vLLM-Ascend's EPLB statistics",
    "load_counter": "vLLM-Ascend's EPLB statistics",
}

#: Under names that other classes may give to weights: by class of the holder.
_SCRATCH_OF_CLASS = {
    (kind, name): reason
    for reason, kinds, names in (
        (
            "inputs of a graph, written in every step (kv_sharing_fast_prefill)",
            ("Gemma3nTextModel", "Gemma4Model"),
            ("positions", "hidden_states", "per_layer_inputs"),
        ),
        (
            "rows of an n-gram table that this step has looked up",
            ("Engram", "EngramBatch"),
            ("staged_rows", "packed_rows", "fp8_values", "fp8_scales"),
        ),
        (
            "computed from uninitialized coefficients in the constructor, and from the loaded ones by the first pass",
            ("FourierRotaryEmbedding",),
            ("cos_sin_cache",),
        ),
    )
    for kind in kinds
    for name in names
}

#: Scratch buffers only if this flag of their holder is set: (flag, buffer), with the reason.
_SCRATCH_IF_FLAG = {
    ("_fp8_dynamic_scale", name): "a vision tower computes it from its input in every pass before it is used"
    for name in ("_fp8_q_scale", "_fp8_k_scale", "_fp8_v_scale")
}

_SCRATCH_OBJECTS = {
    "DirectCPWorkspace": "what ranks of context parallelism exchange",
    "CollectiveKernel": "memory that ranks share while experts' results are summed up",
    "PreTrainedTokenizerBase": "turns text into tokens, and contains its vocabulary in dicts and lists",
    "TokenizerLike": "turns text into tokens, and contains its vocabulary in dicts and lists",
    "ProcessorMixin": "turns media into inputs, with a tokenizer of its own",
    "RoutedExpertsSink": "the experts that the current tokens went to",
}

#: Modules on the meta device: another pipeline stage has the layer, or nothing needs it (the head of an embedding
#: model, the tower of a modality that was switched off).
_PLACEHOLDERS = frozenset({"StageMissingLayer", "PPMissingLayer"})

_FOREIGN_PACKAGES = frozenset(
    {
        "prometheus_client",
        "pydantic",
        "pydantic_core",
        "regex",
        "tokenizers",
        "tqdm",
        "transformers",
        "triton",
        "zmq",
    }
)

#: Settings, names of number formats, the groups of ranks with their buffers and sockets, and compiled graphs, which get
#: weights as inputs. vLLM-Ascend keeps some of them on MoE layers' configurations and on attention implementations.
_PROCESS_WIDE = ("vllm.config", "vllm.scalar_type", "vllm.distributed", "vllm.compilation", "vllm_ascend.distributed")

_IGNORED_WORDS = {
    word: reason
    for reason, words in {
        "where a process runs and its peers": (
            "addr address addresses host hostname ip port ports url uri endpoint pid ppid tid uid uuid id ids "
            "rank ranks device devices gpu gpus npu numa node cpu cpus core cores thread threads sm sms"
        ),
        "how text and media become inputs": "tokenizer processor video videos pruning pruned",
        "where files lie": "path paths dir dirs file files filename folder root",
        "handles, addresses and counters": (
            "handle handles ptr pointer fd stream event count counter nonce hash version"
        ),
        "times and random numbers": "time times timestamp created started now seed random generator",
        "sized by requests, caches and batches": (
            "max batch batched seqs seq token tokens request requests budget chunk chunked cache cached caches kv "
            "memory mem utilization workspace scratch buffer buffers spec speculative"
        ),
        "graphs, adapters and observation": (
            "compile compiled compilation eager graph graphs cudagraph capture captured guards bytecode lora loras "
            "adapter adapters nvtx trace tracing profile profiling profiler debug log logger logging stats metrics "
            "verbose warm warmed warmup jit autotune autotuned tuned tuning initialized"
        ),
    }.items()
    for word in words.split()
}
_IGNORED_NAMES = {
    "block_size": "of the KV cache",
    "kernel_block_size": "of the KV cache",
    "prefix": "the module's name, which the value's own name contains",
    "layer_name": "the module's name, which the value's own name contains",
}
_KERNEL_WORDS = frozenset(
    word
    for words in (
        "use uses used enable enabled support supports supported direct opaque custom backend impl implementation",
        "allow allows eligible capable gemm rocm cuda cublas kernel kernels attn attention fused fuse",
        "quant quantized quantization scale scales method format dtype",
    )
    for word in words.split()
)

VLLM_RULES = ModelRules(
    placeholders=_PLACEHOLDERS,
    foreign_packages=_FOREIGN_PACKAGES,
    wrapped_layer="base_layer",  # LoRA's
    process_wide=_PROCESS_WIDE,
    scratch_buffers=_SCRATCH_BUFFERS,
    scratch_of_class=_SCRATCH_OF_CLASS,
    scratch_if_flag=_SCRATCH_IF_FLAG,
    scratch_objects=_SCRATCH_OBJECTS,
    helper_packages=frozenset({"vllm", "vllm_ascend"}),
    ignored_words=_IGNORED_WORDS,
    ignored_names=_IGNORED_NAMES,
    kernel_words=_KERNEL_WORDS,
)
